"""What an evaluation says of its pairs, as a picture for trackers: how margins and log-probabilities are spread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Columns = Mapping[str, npt.NDArray[np.float32]]

_BINS = 30


def draw_evaluation(title: str, values: Columns) -> Any:
    """A panel for each of the reward margin, the target margin and the gap in log-probability per token that there are.

    Args:
        title: above the panels.
        values: name -> ``[P]``, a number per pair.

    Returns:
        matplotlib's ``Figure``; None where the pairs have none of these, or none that is finite.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {name: known for name, column in _columns(values).items() if (known := column[np.isfinite(column)]).size}
    if not panels:
        return None
    figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (name, column) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        axes.hist(column, bins=_BINS, color="0.6", edgecolor="0.3", linewidth=0.5)
        axes.axvline(float(np.median(column)), color="black", linewidth=1.2)
        axes.axvline(0.0, color="black", linewidth=0.8, linestyle=":")
        axes.set(xlabel=name, ylabel="pairs", title=f"median {np.median(column):.3f}, n = {column.size}")
    return figure


def _columns(values: Columns) -> dict[str, npt.NDArray[np.float32]]:
    """What is drawn, by what a reader calls it."""
    titles = {"rewards/margins": "reward margin", "gamma": "target margin gamma"}
    found = {title: np.asarray(values[name]) for name, title in titles.items() if name in values}
    if "logps/chosen" in values and "logps/rejected" in values:
        gaps = np.asarray(values["logps/chosen"]) - np.asarray(values["logps/rejected"])
        found["log p(y|x) per token, chosen - rejected"] = gaps
    return found
