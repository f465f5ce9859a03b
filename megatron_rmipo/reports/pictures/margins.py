"""RMiPO's target margins on the held-out pairs: the schedule, how margins spread (the paper's Figure 8), the gaps beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_rmipo.objectives.rmipo import Rmipo
from megatron_rmipo.reports.held_out import Record
from megatron_rmipo.reports.pictures.densities import Column, draw_density, points_over
from megatron_rmipo.reports.pictures.gaps import GAP_AXIS, draw_gap_panel
from megatron_rmipo.reports.pictures.runs import gaps_of, values_of
from megatron_rmipo.reports.pictures.style import PALE, legend_below, line_style, marker_style, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What dpmi the schedule is drawn for, in nats; pairs beyond are drawn at its edge.
_DPMI_RANGE = (-1.0, 5.0)
_POINTS = 200
# Of the gaps; far ones would press the curves together.
_SHOWN = 0.95


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


@styled
def draw_schedule(runs: Sequence[MarginRun], *, with_gaps: bool = False) -> Figure:
    """The schedule with each held-out pair on it, and the density of gamma; pale lines are of the first evaluation.

    Args:
        runs: at least one.
        with_gaps: a third panel with the density of the gaps in log-probability.
    """
    from matplotlib.lines import Line2D

    figure, panels = new_figure(1, 3 if with_gaps else 2, (11.5 if with_gaps else 8.0, 3.9))
    schedule, margins = panels[0][:2]
    for number, run in enumerate(runs):
        _draw_schedule(schedule, run, number)
    schedule.set(
        title="schedule and held-out pairs", xlabel="dpmi, or the gap, in nats (beyond the edges: at the edge)", ylabel="gamma"
    )
    columns = [(_finite(run.first, "gamma"), _finite(run.last, "gamma")) for run in runs]
    points = points_over([values for pair in columns for values in pair])
    for line, values in _lines_of(columns):
        draw_density(margins, values, points, **line)
    margins.set(title="target margins", xlabel="gamma", ylabel="density")
    margins.set_ylim(bottom=0.0)
    if with_gaps:
        columns = [(_finite(run.first, "gap"), _finite(run.last, "gap")) for run in runs]
        points = points_over([values for pair in columns for values in pair], _SHOWN)
        draw_gap_panel(panels[0][2], [(values, line) for line, values in _lines_of(columns)], points)
        panels[0][2].set(title="gaps in log-probability", xlabel=GAP_AXIS)
    handles = [
        Line2D([], [], label=f"{run.label}: median gamma {np.median(_finite(run.last, 'gamma')):.2f}", **line_style(number))
        for number, run in enumerate(runs)
    ]
    if any(run.first for run in runs):
        handles.append(Line2D([], [], label="first evaluation", color="black", alpha=PALE, linewidth=0.9))
    legend_below(figure, handles)
    return figure


def _lines_of(columns: Sequence[tuple[Column, Column]]) -> list[tuple[dict[str, Any], Column]]:
    """How the line of each column looks: of the first evaluations, then of the last."""
    pale = {"alpha": PALE, "linewidth": 0.9}
    first = [({**line_style(number), **pale}, values) for number, (values, _) in enumerate(columns)]
    return first + [(line_style(number), values) for number, (_, values) in enumerate(columns)]


def _draw_schedule(axes: Any, run: MarginRun, number: int) -> None:
    """The schedule with a mark for each pair; smaller ones show those of earlier runs beneath them."""
    points = torch.linspace(*_DPMI_RANGE, _POINTS)
    axes.plot(points.numpy(), run.objective.target_margin(points).numpy(), **{**line_style(number), "linewidth": 1.0})
    signal = "dpmi" if run.objective.config.margin_signal == "pmi" else "gap"
    signals = gaps_of(run.last) if signal == "gap" else values_of(run.last, signal)
    gammas = values_of(run.last, "gamma")
    is_known = np.isfinite(signals) & np.isfinite(gammas)
    size = max(2.0, 5.0 - 1.5 * number)
    axes.plot(signals[is_known].clip(*_DPMI_RANGE), gammas[is_known], **marker_style(number), markersize=size, alpha=0.5)


def _finite(pairs: Sequence[Record], name: str) -> Column:
    """A value, or the gap, of the pairs that have it."""
    values = gaps_of(pairs) if name == "gap" else values_of(pairs, name)
    return values[np.isfinite(values)]
