"""The results of several runs as a picture of bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_rmipo.reports.comparison import BEFORE, CHANGE, RunResult
from megatron_rmipo.reports.pictures.style import bar_style, new_figure, short_label, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# View -> (title of a panel, its columns with what the legend calls them; whether they were known before, and are marked).
_ACCURACIES = {"accuracy": "by reward", "accuracy_mean": "by mean log p", "accuracy_sum": "by sum"}
_CHANGES = {column + CHANGE: label for column, label in _ACCURACIES.items()}
_PANELS: Mapping[str, Sequence[tuple[str, Mapping[str, str], bool]]] = {
    "margins": (
        ("held-out accuracy", {"accuracy": "by reward"}, True),
        ("change of accuracy", {"accuracy_change": "by reward"}, False),
        ("held-out margin", {"margin": "margin"}, True),
        ("target margin gamma", {"gamma_p5": "5 %", "gamma_p50": "median", "gamma_p95": "95 %"}, False),
    ),
    "objectives": (
        ("held-out accuracy", _ACCURACIES, True),
        ("change of accuracy", _CHANGES, False),
        ("change of log p per token", {"chosen_change": "chosen", "rejected_change": "rejected"}, False),
        ("pairs per second", {"pairs_per_second": "pairs/s"}, False),
        ("peak memory, GiB", {"memory_gib": "GiB"}, False),
    ),
}


@styled
def draw_comparison(results: Mapping[str, RunResult | None], view: str) -> Figure:
    """A bar chart of the runs that have results, a panel for each kind of number; a missing number has no bar.

    What a figure was before training is a mark on its bar. A mean over held-out pairs has its standard error drawn, over the
    seeds where there are several.

    Args:
        results: run -> what is known of it.
        view: which numbers.
    """
    shown = {run: result for run, result in results.items() if result is not None}
    panels = _PANELS[view]
    figure, grid = new_figure(1, len(panels), (3.6 * len(panels), 1.8 + 0.4 * len(shown)), sharey=True)
    for axes, (title, columns, is_marked) in zip(grid[0], panels, strict=True):
        _draw_panel(axes, list(shown.values()), columns, is_marked=is_marked)
        axes.set_title(title)
        axes.grid(visible=False, axis="y")
        if len(columns) > 1 or is_marked:
            # Below, where no bar is.
            axes.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.08), columnspacing=1.0, handlelength=1.6)
    grid[0][0].set_yticks(range(len(shown)), [short_label(run) for run in shown])
    # The first run on top.
    grid[0][0].invert_yaxis()
    figure.supxlabel(_stands_on(list(shown.values())), fontsize="small")
    return figure


def _draw_panel(axes: Any, results: Sequence[RunResult], columns: Mapping[str, str], *, is_marked: bool) -> None:
    height = 0.8 / len(columns)
    for number, (column, label) in enumerate(columns.items()):
        known = [(row, result) for row, result in enumerate(results) if result.values.get(column) is not None]
        places = [row + (number - (len(columns) - 1) / 2) * height for row, _ in known]
        errors = [result.error(column) or 0.0 for _, result in known]
        error_bars = {"xerr": errors, "ecolor": "black", "error_kw": {"elinewidth": 1.0}} if any(errors) else {}
        axes.barh(places, [result.values[column] for _, result in known], height, label=label, **bar_style(number), **error_bars)
        if is_marked:
            marked = [(place, result.values.get(column + BEFORE)) for place, (_, result) in zip(places, known, strict=True)]
            before = [(value, place) for place, value in marked if value is not None]
            # One entry in the legend, whatever the number of columns.
            values, heights = [value for value, _ in before], [place for _, place in before]
            axes.plot(values, heights, "kd", markersize=4, label="before" if number == 0 else None)


def _stands_on(results: Sequence[RunResult]) -> str:
    """What the bars and their errors stand on."""
    pairs = sorted(
        {f"{result.values['held_out_pairs']:.0f}" for result in results if result.values.get("held_out_pairs")}, key=int
    )
    most = max(result.num_seeds for result in results)
    over = "the held-out pairs" if most == 1 else f"the seeds of a row (up to {most}), of a single one over the held-out pairs"
    return f"n = {', '.join(pairs) or 'unknown'} held-out pairs; error bars: standard error over {over}"
