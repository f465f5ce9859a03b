"""How much a result depends on beta and gamma, from a grid of runs: the paper's Figure 2."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.reports.pictures.style import REFERENCE_COLOR, line_style, marker_style, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A margin's options, in the order in which they are shown, and what their axis is called.
_MARGIN_OPTIONS = {"gamma_min": "gamma bounds", "gamma_max": "gamma bounds", "gamma_beta_ratio": "gamma / beta"}
_MISSING = "#eeeeee"


@dataclasses.dataclass(frozen=True)
class GridRun:
    """A run of a grid.

    Attributes:
        label: what the run is called.
        objective: its objective.
        options: the objective's options, and what else tells two grids apart, such as the learning rate.
        results: what is measured -> (after training, its standard error, before training); None where it is not known.
    """

    label: str
    objective: str
    options: Mapping[str, Any]
    results: Mapping[str, tuple[float, float | None, float | None]]

    @property
    def beta(self) -> float | None:
        """The scale of its rewards; None where it has none."""
        return self.options.get("beta")

    @property
    def margin(self) -> tuple[float, ...]:
        """The values of its margin's options, in order."""
        return tuple(self.options[name] for name in _MARGIN_OPTIONS if self.options.get(name) is not None)

    @property
    def other_options(self) -> frozenset[tuple[str, Any]]:
        """What is neither beta nor a margin."""
        return frozenset((name, value) for name, value in self.options.items() if name not in ("beta", *_MARGIN_OPTIONS))


@dataclasses.dataclass(frozen=True)
class Grid:
    """Runs that differ in beta and in their margins alone.

    Attributes:
        title: the objective, and what tells it from other grids of that objective.
        runs: at least two different settings.
        betas, margins: that any of them has, rising.
    """

    title: str
    runs: Sequence[GridRun]
    betas: Sequence[float | None]
    margins: Sequence[tuple[float, ...]]

    def cell(self, beta: float | None, margin: tuple[float, ...], measure: str) -> tuple[float, float, int] | None:
        """(mean, its standard error, number of runs) of a setting; None where no run has it.

        Of one run the error is the run's own, of several that of their mean; 0 where it is not known.
        """
        found = [run.results[measure] for run in self.runs if (run.beta, run.margin) == (beta, margin) and measure in run.results]
        if not found:
            return None
        values = [value for value, _, _ in found]
        error = found[0][1] or 0.0 if len(found) == 1 else statistics.stdev(values) / math.sqrt(len(values))
        return statistics.mean(values), error, len(values)

    def before(self, measure: str) -> float | None:
        """The mean result before training, over the runs that know it."""
        known = [run.results[measure][2] for run in self.runs if measure in run.results]
        found = [value for value in known if value is not None]
        return statistics.mean(found) if found else None


def find_grids(runs: Sequence[GridRun]) -> tuple[list[Grid], list[GridRun]]:
    """The grids among some runs.

    Returns:
        The grids; the runs that belong to none, as they differ from every other one in something else.

    Raises:
        ConfigError: there is no grid.
    """
    groups: dict[tuple[str, frozenset[tuple[str, Any]]], list[GridRun]] = {}
    for run in runs:
        groups.setdefault((run.objective, run.other_options), []).append(run)
    found = {key: group for key, group in groups.items() if len({(run.beta, run.margin) for run in group}) > 1}
    if not found:
        raise ConfigError(
            "--runs: no two of them differ in beta, gamma_min, gamma_max or gamma_beta_ratio alone. Name the runs of a grid over "
            "these."
        )
    grids = []
    for (objective, options), group in found.items():
        others = [options_of for name, options_of in found if name == objective and options_of != options]
        apart = sorted(f"{name} {value}" for name, value in options if any((name, value) not in other for other in others))
        betas = sorted({run.beta for run in group}, key=lambda beta: -1.0 if beta is None else beta)
        grids.append(Grid(", ".join([objective, *apart]), group, betas, sorted({run.margin for run in group})))
    alone = [run for key, group in groups.items() if key not in found for run in group]
    return grids, alone


def margin_text(margin: tuple[float, ...]) -> str:
    """A margin as it is shown: one number, or bounds."""
    return f"{margin[0]:g}" if len(margin) == 1 else f"[{', '.join(f'{value:g}' for value in margin)}]" if margin else "none"


@styled
def draw_sensitivity(grids: Sequence[Grid]) -> Figure:
    """A column a grid, a row a measure: a line over what varies, or a map where beta and margins both do.

    The dashed line is the result before training. A setting that no run has, or whose run has no such result, is hatched.

    Args:
        grids: at least one.
    """
    measures = list(dict.fromkeys(name for grid in grids for run in grid.runs for name in run.results))
    widths = [max(3.2, 0.75 * (len(grid.margins) if len(grid.margins) > 1 else len(grid.betas)) + 1.2) for grid in grids]
    heights = max(2.8, 1.4 + 0.5 * max(len(grid.betas) for grid in grids))
    figure, panels = new_figure(len(measures), len(grids), (sum(widths), heights * len(measures)), width_ratios=widths)
    for row, measure in enumerate(measures):
        every = [value for grid in grids for run in grid.runs if measure in run.results for value in run.results[measure][:1]]
        lines: list[Any] = []
        for column, grid in enumerate(grids):
            axes = panels[row][column]
            if len(grid.betas) > 1 and len(grid.margins) > 1:
                _draw_map(figure, axes, grid, measure, (min(every), max(every)))
            else:
                _draw_line(axes, grid, measure)
                lines.append(axes)
            axes.set_title(grid.title)
        spans = [axes.get_ylim() for axes in lines]
        for axes in lines:
            axes.set_ylim(min(low for low, _ in spans), max(high for _, high in spans))
    return figure


def _margin_axis(grid: Grid) -> str:
    names = {title for run in grid.runs for name, title in _MARGIN_OPTIONS.items() if run.options.get(name) is not None}
    return " or ".join(sorted(names))


def _draw_line(axes: Any, grid: Grid, measure: str) -> None:
    over_margins = len(grid.margins) > 1
    settings = (
        [(grid.betas[0], margin) for margin in grid.margins] if over_margins else [(beta, grid.margins[0]) for beta in grid.betas]
    )
    cells = [grid.cell(beta, margin, measure) for beta, margin in settings]
    known = [(place, *cell) for place, cell in enumerate(cells) if cell is not None]
    if known:
        places, values, errors, _ = zip(*known, strict=True)
        axes.errorbar(places, values, yerr=errors, **line_style(0), marker=marker_style(0)["marker"], markersize=5, capsize=2.0)
    before = grid.before(measure)
    if before is not None:
        axes.axhline(before, color=REFERENCE_COLOR, linestyle="--", linewidth=1.0)
        axes.annotate(
            "before",
            (1.0, before),
            (-2, 2),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            fontsize=7.5,
        )
    labels = [margin_text(margin) for margin in grid.margins] if over_margins else [_beta_text(beta) for beta in grid.betas]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    for place, cell in enumerate(cells):
        if cell is None:
            axes.axvspan(place - 0.3, place + 0.3, facecolor=_MISSING, edgecolor=REFERENCE_COLOR, hatch="///", linewidth=0.0)
    fixed = f"beta = {_beta_text(grid.betas[0])}" if over_margins else f"{_margin_axis(grid)} = {margin_text(grid.margins[0])}"
    has_fixed = grid.betas[0] is not None if over_margins else bool(grid.margins[0])
    axes.set(xlabel=(_margin_axis(grid) if over_margins else "beta") + (f"   ({fixed})" if has_fixed else ""), ylabel=measure)


def _draw_map(figure: Figure, axes: Any, grid: Grid, measure: str, span: tuple[float, float]) -> None:
    cells = [[grid.cell(beta, margin, measure) for margin in grid.margins] for beta in grid.betas]
    values = np.array([[np.nan if cell is None else cell[0] for cell in row] for row in cells])
    axes.set_facecolor(_MISSING)
    axes.grid(visible=False)
    # Its lightness rises evenly: grey says the same.
    shades = axes.imshow(values, cmap="cividis", vmin=span[0], vmax=span[1], aspect="auto")
    figure.colorbar(shades, ax=axes, label=measure)
    for (row, column), value in np.ndenumerate(values):
        cell = cells[row][column]
        if cell is None:
            axes.axvspan(
                column - 0.5,
                column + 0.5,
                *_part(row, len(cells)),
                fill=False,
                edgecolor=REFERENCE_COLOR,
                hatch="///",
                linewidth=0,
            )
            axes.text(
                column,
                row,
                "missing",
                ha="center",
                va="center",
                fontsize=7.5,
                bbox={"facecolor": _MISSING, "linewidth": 0, "pad": 1.5},
            )
        else:
            is_dark = shades.norm(value) < 0.5
            text = f"{value:.3f}" + (f"\n({cell[2]} runs)" if cell[2] > 1 else "")
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if is_dark else "black")
    axes.set_xticks(range(len(grid.margins)), [margin_text(margin) for margin in grid.margins])
    axes.set_yticks(range(len(grid.betas)), [_beta_text(beta) for beta in grid.betas])
    before = grid.before(measure)
    axes.set(xlabel=_margin_axis(grid) + ("" if before is None else f"   (before training: {before:.3f})"), ylabel="beta")


def _part(row: int, rows: int) -> tuple[float, float]:
    """Where a row of the map lies on its axis, as a part of it from below."""
    return 1.0 - (row + 1) / rows, 1.0 - row / rows


def _beta_text(beta: float | None) -> str:
    return "of each pair" if beta is None else f"{beta:g}"
