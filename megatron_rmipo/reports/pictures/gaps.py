"""How far apart a model holds the two responses of a pair, by category of the data: the paper's Figure 3."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_rmipo.reports.pictures.densities import Column, draw_density, points_over
from megatron_rmipo.reports.pictures.style import REFERENCE_COLOR, legend_below, line_style, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP_AXIS = "log p(y|x) per token, chosen - rejected"
# Of the values; far ones would press the curves together.
_SHOWN = 0.98


@dataclasses.dataclass(frozen=True)
class GapRun:
    """The gaps in log-probability of a run's held-out pairs.

    Attributes:
        label: what the run is called.
        first, last: category -> the gaps ``[P]``, all finite, at its first evaluation (which may have none) and at its last.
    """

    label: str
    first: Mapping[str, Column]
    last: Mapping[str, Column]


@styled
def draw_gaps(runs: Sequence[GapRun]) -> Figure:
    """A column a run: above the densities of the first evaluation, below those of the last; a line a category.

    Args:
        runs: at least one, with at least one gap.
    """
    from matplotlib.lines import Line2D

    categories = list(dict.fromkeys(category for run in runs for category in run.last))
    moments = ["first", "last"] if any(run.first for run in runs) else ["last"]
    titles = {"first": "first evaluation", "last": "last evaluation"}
    figure, panels = new_figure(
        len(moments), len(runs), (max(4.2, 3.4 * len(runs)), 0.9 + 2.3 * len(moments)), sharex=True, sharey="row"
    )
    points = points_over([values for run in runs for moment in (run.first, run.last) for values in moment.values()], _SHOWN)
    for column, run in enumerate(runs):
        for row, moment in enumerate(moments):
            axes = panels[row][column]
            gaps: Mapping[str, Column] = getattr(run, moment)
            draw_gap_panel(
                axes, [(gaps[category], line_style(n)) for n, category in enumerate(categories) if category in gaps], points
            )
            axes.set_title(f"{run.label}: {titles[moment]}")
            if column == 0:
                axes.set_ylabel("density")
        panels[-1][column].set_xlabel(GAP_AXIS)
    counts = {category: max(len(run.last.get(category, ())) for run in runs) for category in categories}
    legend_below(
        figure,
        [Line2D([], [], label=f"{category} (n = {counts[category]})", **line_style(n)) for n, category in enumerate(categories)],
    )
    return figure


def draw_gap_panel(axes: Any, curves: Sequence[tuple[Column, Mapping[str, Any]]], points: Column) -> None:
    """Densities of gaps, with a line where both responses are as likely.

    Args:
        axes: the panel.
        curves: the gaps ``[P]`` and how their line looks.
        points: where the densities are drawn.
    """
    for values, line in curves:
        draw_density(axes, values, points, **line)
    axes.axvline(0.0, color=REFERENCE_COLOR, linewidth=0.8, zorder=0.5)
    axes.set_ylim(bottom=0.0)
