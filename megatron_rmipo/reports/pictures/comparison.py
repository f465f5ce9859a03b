"""The results of several runs as a picture of bars."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron_rmipo.reports.comparison import COLUMNS, RunResult
from megatron_rmipo.reports.pictures.style import bar_style, new_figure, short_label, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# View -> (title of a panel, its columns).
_PANELS = {
    "margins": (
        ("held-out accuracy", ("accuracy",)),
        ("held-out margin", ("margin",)),
        ("target margin gamma", ("gamma_p5", "gamma_p50", "gamma_p95")),
    ),
    "objectives": (
        ("held-out accuracy", ("accuracy", "accuracy_mean", "accuracy_sum")),
        ("change of log p per token", ("chosen_change", "rejected_change")),
        ("pairs per second", ("pairs_per_second",)),
        ("peak memory, GiB", ("memory_gib",)),
    ),
}


@styled
def draw_comparison(results: Mapping[str, RunResult | None], view: str) -> Figure:
    """A bar chart of the runs that have results, a panel for each kind of number; a missing number has no bar.

    A mean over held-out pairs has its standard error drawn.

    Args:
        results: run -> what is known of it.
        view: which numbers.
    """
    shown = {run: result for run, result in results.items() if result is not None}
    panels = _PANELS[view]
    figure, grid = new_figure(1, len(panels), (3.3 * len(panels), 1.8 + 0.4 * len(shown)), sharey=True)
    for axes, (title, columns) in zip(grid[0], panels, strict=True):
        height = 0.8 / len(columns)
        for number, column in enumerate(columns):
            bars = [
                (row, result.values[column]) for row, result in enumerate(shown.values()) if result.values[column] is not None
            ]
            places = [row + (number - (len(columns) - 1) / 2) * height for row, _ in bars]
            errors = [list(shown.values())[row].errors.get(column) or 0.0 for row, _ in bars]
            error_bars = {"xerr": errors, "ecolor": "black", "error_kw": {"elinewidth": 1.0}} if any(errors) else {}
            axes.barh(places, [value for _, value in bars], height, label=COLUMNS[column][0], **bar_style(number), **error_bars)
        axes.set_title(title)
        axes.grid(visible=False, axis="y")
        if len(columns) > 1:
            # Below, where no bar is.
            axes.legend(ncols=len(columns), loc="upper center", bbox_to_anchor=(0.5, -0.08), columnspacing=1.0, handlelength=1.6)
    grid[0][0].set_yticks(range(len(shown)), [short_label(run) for run in shown])
    # The first run on top.
    grid[0][0].invert_yaxis()
    return figure
