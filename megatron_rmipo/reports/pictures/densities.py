"""Densities of values of pairs, as curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Column = npt.NDArray[np.float64]

# How wide a value is, as a part of the axis.
_BANDWIDTH = 0.03
_POINTS = 200


def density(values: Column, points: Column) -> Column:
    """Gaussian kernel density of ``values`` at ``points`` (evenly spaced), a kernel's width a fixed part of their range.

    One fitted to the values would spread out the many pairs that sit at a bound.
    """
    width = _BANDWIDTH * (points[-1] - points[0])
    distances = (points[:, None] - values[None, :]) / width
    heights: Column = np.exp(-0.5 * distances**2).sum(axis=1) / (len(values) * width * np.sqrt(2.0 * np.pi))
    return heights


def points_over(columns: Sequence[Column], share: float = 1.0) -> Column:
    """Evenly spaced points over the middle ``share`` of all columns' values, and somewhat beyond.

    Args:
        columns: at least one with a value.
        share: of 1 all; what lies far out of a smaller one is not drawn.
    """
    every = np.concatenate(list(columns))
    low, high = np.quantile(every, ((1.0 - share) / 2.0, (1.0 + share) / 2.0))
    beyond = max(0.15 * float(high - low), 0.05)
    return np.linspace(low - beyond, high + beyond, _POINTS)


def draw_density(axes: Any, values: Column, points: Column, **line: Any) -> None:
    """The density of the values as a line; nothing where there are none."""
    if values.size:
        axes.plot(points, density(values, points), **line)
