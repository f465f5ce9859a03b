"""What training costs and how it goes, for several runs: the paper's Figure 7."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_rmipo.reports.held_out import Record
from megatron_rmipo.reports.pictures.densities import Column
from megatron_rmipo.reports.pictures.style import PALE, bar_style, legend_below, line_style, marker_style, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Metric -> title of its panel.
_CURVES = {"loss": "loss", "rewards/margins": "reward margin", "rewards/accuracies": "win rate of chosen"}
# Over which part of a training its curves are averaged, unless another is asked for.
SMOOTHING = 0.02
X_AXES = {"steps": "step", "hours": "hours of training", "gpu-hours": "GPU-hours of training"}


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """How a training went.

    Attributes:
        label: what the run is called.
        x: metric -> where its records stand on the axis, ``[N]``, rising.
        y: metric -> its values, ``[N]``, NaN where a record has none.
        held_out_x, held_out_y: the same of its evaluations.
        hours: of all ranks together, or of one, as the axis of costs says.
        pairs_per_second: median of the records; None where none has it.
        memory_gib: peak of the first rank; None where it was not recorded.
    """

    label: str
    x: Column
    y: Mapping[str, Column]
    held_out_x: Column
    held_out_y: Mapping[str, Column]
    hours: float
    pairs_per_second: float | None
    memory_gib: float | None


def training_run(label: str, records: Sequence[Record], evaluations: Sequence[Record], unit: str, num_ranks: int) -> TrainingRun:
    """What is drawn of a run's records.

    Args:
        label: what the run is called.
        records: of its steps, at least one, in order.
        evaluations: in order; may be empty.
        unit: of the axis, a key of :data:`X_AXES`.
        num_ranks: of the run, by which its hours are multiplied; 1 for its own hours.
    """
    steps = np.array([0.0, *(record["step"] for record in records)])
    seconds = np.array([record.get("step_seconds") or 0.0 for record in records])
    # A record's seconds are the mean over the steps since the one before.
    hours = np.cumsum([0.0, *(np.diff(steps) * seconds)]) * num_ranks / 3600.0
    evaluated = np.array([float(record["step"]) for record in evaluations])
    on_axis = steps if unit == "steps" else hours
    memory, speed = (
        [record[name] for record in records if record.get(name) is not None] for name in ("memory_gib", "pairs_per_second")
    )
    return TrainingRun(
        label,
        on_axis[1:],
        {name: _column(records, name) for name in _CURVES},
        np.interp(evaluated, steps, on_axis),
        {name: _column(evaluations, name) for name in _CURVES},
        float(hours[-1]),
        statistics.median(speed) if speed else None,
        max(memory) if memory else None,
    )


def _column(records: Sequence[Record], name: str) -> Column:
    return np.array([np.nan if record.get(name) is None else record[name] for record in records], dtype=np.float64)


def smooth(x: Column, values: Column, share: float) -> Column:
    """A moving average to both sides, which does not lag behind; a value that is missing (NaN) is passed over, and stays missing.

    ``s_t = sum_k d_tk v_k / sum_k d_tk``, ``d_tk = exp(-|x_t - x_k| / (share (x_N - x_1)))``.

    Args:
        x: where the values stand, ``[N]``, rising.
        values: ``[N]``.
        share: the part of the axis over which a value's influence falls to a third; 0 leaves the values as they are.
    """
    is_known = np.isfinite(values)
    if not is_known.any() or share == 0.0 or x[-1] == x[0]:
        return values
    # What a step to the next value leaves of the influence; a sum to each side is then one walk.
    kept = np.exp(-np.diff(x) / (share * (x[-1] - x[0])))
    known = np.stack([np.where(is_known, values, 0.0), is_known.astype(np.float64)])
    sums = _walk(known, kept) + _walk(known[:, ::-1], kept[::-1])[:, ::-1] - known
    return np.where(is_known, sums[0] / np.where(is_known, sums[1], 1.0), np.nan)


def _walk(values: Column, kept: Column) -> Column:
    """``s_t = v_t + kept_(t-1) s_(t-1)`` of each row, ``[R, N]``."""
    sums = values.copy()
    for number in range(1, values.shape[1]):
        sums[:, number] += kept[number - 1] * sums[:, number - 1]
    return sums


@styled
def draw_training(runs: Sequence[TrainingRun], unit: str = "steps", smoothing: float = SMOOTHING) -> Figure:
    """Loss, reward margin and win rate over the training, smoothed, records pale, evaluations as marks; what it cost as bars.

    Args:
        runs: at least one.
        unit: of the axis, a key of :data:`X_AXES`.
        smoothing: the share of :func:`smooth`.
    """
    from matplotlib.lines import Line2D

    figure, panels = new_figure(2, 3, (11.0, 4.2 + 0.22 * len(runs)), height_ratios=(3.0, 1.0 + 0.22 * len(runs)))
    for axes, (name, title) in zip(panels[0], _CURVES.items(), strict=True):
        for number, run in enumerate(runs):
            axes.plot(run.x, run.y[name], color=line_style(number)["color"], alpha=PALE, linewidth=0.7)
            axes.plot(run.x, smooth(run.x, run.y[name], smoothing), **line_style(number))
            axes.plot(run.held_out_x, run.held_out_y[name], **marker_style(number), markersize=5, markerfacecolor="white")
        axes.set(title=title, xlabel=X_AXES[unit])
    hours, speed, memory = panels[1]
    per_hour, name = (1.0, "hours") if max(run.hours for run in runs) > 1.0 else (60.0, "minutes")
    title = f"{'GPU-' if unit == 'gpu-hours' else ''}{name} of training"
    _draw_costs(hours, title, runs, [per_hour * run.hours for run in runs])
    _draw_costs(speed, "pairs per second, median", runs, [run.pairs_per_second for run in runs])
    _draw_costs(memory, "peak memory of the first rank, GiB", runs, [run.memory_gib for run in runs])
    hours.set_yticks(range(len(runs)), [run.label for run in runs])
    handles = [
        Line2D(
            [], [], label=run.label, **{**line_style(number), "marker": marker_style(number)["marker"]}, markerfacecolor="white"
        )
        for number, run in enumerate(runs)
    ]
    handles.append(
        Line2D([], [], label="marks: held-out pairs", color="black", marker="o", markerfacecolor="white", linestyle="none")
    )
    handles.append(Line2D([], [], label="pale: as recorded", color="black", alpha=PALE, linewidth=0.7))
    legend_below(figure, handles)
    return figure


def _draw_costs(axes: Any, title: str, runs: Sequence[TrainingRun], values: Sequence[float | None]) -> None:
    for number, value in enumerate(values):
        if value is not None:
            axes.barh(number, value, 0.7, **bar_style(number))
            axes.annotate(f"{value:.3g}", (value, number), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_title(title)
    axes.set_yticks([])
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.margins(x=0.15)
    axes.grid(visible=False, axis="y")
