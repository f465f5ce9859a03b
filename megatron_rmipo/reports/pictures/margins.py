"""RMiPO's target margins on the held-out pairs as a picture: the schedule, how margins spread, and the gaps they stand beside.

The first two panels are the paper's Figure 8, the third its Figure 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.rmipo import Rmipo
from megatron_rmipo.reports.held_out import Record

Column = npt.NDArray[np.float64]

# What dpmi the schedule is drawn for, in nats; pairs beyond are drawn at its edge.
_DPMI_RANGE = (-1.0, 5.0)
# Of a density: how wide a pair is, as a part of the axis.
_BANDWIDTH = 0.03
_POINTS = 400


@dataclasses.dataclass(frozen=True)
class MarginRun:
    """A run of RMiPO whose margins are drawn.

    Attributes:
        label: what the run is called.
        objective: its objective.
        first, last: the held-out pairs of its first and its last evaluation; the first may be empty.
    """

    label: str
    objective: Rmipo
    first: Sequence[Record]
    last: Sequence[Record]


def draw_margins(path: Path, runs: Sequence[MarginRun]) -> None:
    """Write the picture: the schedule with each held-out pair on it, the density of gamma, the density of the gaps.

    The gap of a pair is that of the mean log-probabilities per token, chosen less rejected. A density of the first evaluation is
    dashed.

    Args:
        path: file to write; its extension says the format.
        runs: at least one.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"--picture {path}: the package matplotlib is missing. Install it with pip install 'megatron-rmipo[plots]', or leave "
            "the flag out."
        ) from error
    figure = Figure(figsize=(13.5, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    schedule, margins, gaps = figure.subplots(1, 3)
    for number, run in enumerate(runs):
        _draw_schedule(schedule, run, f"C{number}", marker_size=max(2.0, 7.0 - 2.0 * number))
    columns = _columns(runs, "gamma")
    every = np.concatenate([values for pair in columns for values in pair])
    _draw_densities(margins, runs, columns, (float(every.min()) - 0.1, float(every.max()) + 0.1))
    columns = _columns(runs, "gap")
    edge = max(float(np.quantile(np.abs(values), 0.95)) for pair in columns for values in pair if values.size)
    _draw_densities(gaps, runs, columns, (-1.1 * edge, 1.1 * edge))
    schedule.set(
        title="schedule and held-out pairs", xlabel="dpmi, or the gap, in nats (beyond the edges: at the edge)", ylabel="gamma"
    )
    margins.set(title="target margins", xlabel="gamma", ylabel="density")
    gaps.set(title="gaps in log-probability", xlabel="log p(y|x) per token, chosen - rejected")
    gaps.axvline(0.0, color="grey", linewidth=0.8)
    for axes in (schedule, margins, gaps):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15))  # below: it would hide a curve
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--picture {path}: cannot be written: {error}") from error


def density(values: Column, points: Column) -> Column:
    """Gaussian kernel density of ``values`` at ``points`` (evenly spaced), a kernel's width a fixed part of their range.

    One fitted to the values would spread out the many pairs that sit at a bound.
    """
    width = _BANDWIDTH * (points[-1] - points[0])
    distances = (points[:, None] - values[None, :]) / width
    heights: Column = np.exp(-0.5 * distances**2).sum(axis=1) / (len(values) * width * np.sqrt(2.0 * np.pi))
    return heights


def _draw_schedule(axes: Any, run: MarginRun, color: str, marker_size: float) -> None:
    """The schedule with a mark for each pair; smaller ones show those of earlier runs beneath them."""
    points = torch.linspace(*_DPMI_RANGE, _POINTS)
    axes.plot(points, run.objective.target_margin(points), color=color, linewidth=1.0, label=run.label)
    signals = _values(run.last, "dpmi" if run.objective.config.margin_signal == "pmi" else "gap")
    gammas = _values(run.last, "gamma")
    # Not so where some pairs have a value that is not finite.
    if len(signals) == len(gammas):
        axes.plot(signals.clip(*_DPMI_RANGE), gammas, "o", color=color, markersize=marker_size, alpha=0.5)


def _draw_densities(
    axes: Any, runs: Sequence[MarginRun], columns: Sequence[tuple[Column, Column]], span: tuple[float, float]
) -> None:
    points = np.linspace(*span, _POINTS)
    for number, (run, (first, last)) in enumerate(zip(runs, columns, strict=True)):
        if first.size:
            axes.plot(points, density(first, points), "--", color=f"C{number}", linewidth=1.0)
        axes.plot(points, density(last, points), color=f"C{number}", label=f"{run.label}: median {np.median(last):.2f}")


def _columns(runs: Sequence[MarginRun], name: str) -> list[tuple[Column, Column]]:
    """Of each run a value of every pair, at the first evaluation and at the last."""
    return [(_values(run.first, name), _values(run.last, name)) for run in runs]


def _values(pairs: Sequence[Record], name: str) -> Column:
    if name == "gap":
        both = [(pair.get("logps/chosen"), pair.get("logps/rejected")) for pair in pairs]
        found = [chosen - rejected for chosen, rejected in both if chosen is not None and rejected is not None]
    else:
        found = [pair[name] for pair in pairs if pair.get(name) is not None]
    return np.array(found, dtype=np.float64)
