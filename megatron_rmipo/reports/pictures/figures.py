"""Which figures there are, and what each is drawn from: runs, and what the data say of their held-out pairs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from megatron_rmipo.config.schema import Config
from megatron_rmipo.data.layouts.scores import score_difference
from megatron_rmipo.data.reading.rows import RowFault
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.rmipo import Rmipo, RmipoConfig
from megatron_rmipo.reports.comparison import held_out_pairs, read_config
from megatron_rmipo.reports.held_out import recorded
from megatron_rmipo.reports.pictures.densities import Column
from megatron_rmipo.reports.pictures.evaluations import JUDGED, judged_wins
from megatron_rmipo.reports.pictures.gaps import GapRun, draw_gaps
from megatron_rmipo.reports.pictures.margins import MarginRun, draw_schedule
from megatron_rmipo.reports.pictures.rewards import RewardRun, draw_rewards
from megatron_rmipo.reports.pictures.runs import Run, gaps_of, values_of
from megatron_rmipo.reports.pictures.sensitivity import GridRun, draw_sensitivity, find_grids
from megatron_rmipo.reports.pictures.training import SMOOTHING, TrainingRun, draw_training, training_run
from megatron_rmipo.reports.pictures.wins import count_wins, draw_wins
from megatron_rmipo.reports.reporter import EVALUATIONS_FOLDER, FACTS_FILE, METRICS_FILE, PAIRS_FILE
from megatron_rmipo.reports.summary import check_rows_are_of, read_kinds, read_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What tells two grids of an objective apart, besides its options.
_APART = ("lr", "global_batch_size", "train_iters", "epochs")
ALL_PAIRS = "all pairs"
_Read = TypeVar("_Read")
# A figure, and of each run that is not in it the reason.
Plotted = tuple["Figure", list[str]]


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What a figure is drawn from.

    Attributes:
        runs: whose logs there are.
        judged: label (empty for the model's name) -> an evaluation that was named by itself.
        rows: the jsonl file the held-out pairs came from.
        category: the field of the rows that groups them.
        scores: the field of the rows with the difference in score; None for those that public data sets have.
        wins_by: ``log-probs`` or ``judge``.
        unit: of the axis of a training.
        smoothing: of its curves.
    """

    runs: Sequence[Run]
    judged: Sequence[tuple[str, Path]] = ()
    rows: Path | None = None
    category: str = "kind"
    scores: str | None = None
    wins_by: str = "log-probs"
    unit: str = "steps"
    smoothing: float = SMOOTHING


def _of_each(runs: Sequence[Run], read: Callable[[Run], _Read]) -> tuple[list[_Read], list[str]]:
    """What is read of each run that has it, and of the others the reasons.

    Raises:
        ConfigError: none has it.
    """
    found, errors = [], []
    for run in runs:
        try:
            found.append(read(run))
        except ConfigError as error:
            errors.append(error)
    if errors and not found:
        raise errors[0]
    if not found:
        raise ConfigError("--runs: evaluations alone; this figure is drawn from the logs of runs. Name their directories.")
    return found, [str(error) for error in errors]


def plot_sensitivity(drawing: Drawing) -> Plotted:
    """Accuracy, and a judge's win rate where there is one, over beta and gamma: Figure 2."""
    runs, left_out = _of_each(drawing.runs, _grid_run)
    grids, alone = find_grids(runs)
    left_out += [f"{run.label} differs from every other run in more than beta and its margin." for run in alone]
    return draw_sensitivity(grids), left_out


def _grid_run(run: Run) -> GridRun:
    trainers = set(Config().to_flat_dict()) - set(_APART)
    options = {name: _plain(value) for name, value in run.config.items() if name not in trainers and value is not None}
    evaluations = run.evaluations
    results: dict[str, tuple[float, float | None, float | None]] = {}
    after = recorded(evaluations[-1], "rewards/accuracies") if evaluations else None
    if after is not None:
        before = recorded(evaluations[0], "rewards/accuracies") if len(evaluations) > 1 else None
        results["held-out accuracy"] = (after.value, after.error, before.value if before is not None else None)
    for rate in judged_wins(run.label, run.evaluation_files)[:1]:
        results["judge's win rate"] = (rate.rate, None, None)
    return GridRun(run.label, str(run.config.get("objective")), options, results)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float)) else json.dumps(value)


def plot_gaps(drawing: Drawing) -> Plotted:
    """Densities of the gaps in log-probability by category, first against last evaluation: Figure 3."""
    runs, left_out = _of_each(drawing.runs, lambda run: _gap_run(drawing, run))
    return draw_gaps(runs), left_out


def _gap_run(drawing: Drawing, run: Run) -> GapRun:
    """The gaps of a run by category.

    Raises:
        ConfigError: it has none, or the rows are those of other pairs.
    """
    last = _gaps(run)
    return GapRun(run.label, _by_category(drawing, gaps_of(run.first_pairs)), _by_category(drawing, last))


def _gaps(run: Run) -> Column:
    gaps = gaps_of(run.last_pairs)
    if not np.isfinite(gaps).any():
        raise ConfigError(
            f"{run.log_dir / PAIRS_FILE} has no pair with log-probs of both responses: {run.config.get('objective')} scores one "
            "alone, or the run has diverged."
        )
    return gaps


def _by_category(drawing: Drawing, values: Column) -> dict[str, Column]:
    """Values of pairs, those that are known, by category, the largest first."""
    if not values.size:
        return {}
    if drawing.rows is None:
        return {ALL_PAIRS: values[np.isfinite(values)]}
    kinds = read_kinds(drawing.rows, drawing.category)
    check_rows_are_of(drawing.rows, len(kinds), len(values))
    names = sorted(set(kinds), key=lambda kind: (-kinds.count(kind), kind))
    is_of = np.array(kinds)
    found = {name: values[(is_of == name) & np.isfinite(values)] for name in names}
    return {name: of_kind for name, of_kind in found.items() if of_kind.size}


def plot_wins(drawing: Drawing) -> Plotted:
    """How often the chosen response is the likelier one, or a judge prefers a model's answers: Figure 5."""
    if drawing.wins_by == "judge":
        rates = [rate for run in drawing.runs for rate in judged_wins(run.label, run.evaluation_files)]
        rates += [rate for label, path in drawing.judged for rate in judged_wins(label, [path])]
        if not rates:
            raise ConfigError(
                f"--by judge: no evaluation of the kind {JUDGED} in {EVALUATIONS_FOLDER}/*.json of the runs, nor named by itself."
                " Name its file: --runs LABEL=FILE.json."
            )
        return draw_wins(rates, "wins as a judge sees them"), []
    runs, left_out = _of_each(drawing.runs, lambda run: _gap_run(drawing, run))
    counted = [
        count_wins(run.label, category, gaps.tolist(), run.first.get(category, np.empty(0)).tolist())
        for run in runs
        for category, gaps in run.last.items()
    ]
    return draw_wins(counted, "wins of the chosen response, by log p(y|x) per token"), left_out


def plot_rewards(drawing: Drawing) -> Plotted:
    """Reward differences against the data's own score differences: Figure 6."""
    runs, left_out = _of_each(drawing.runs, lambda run: _reward_run(drawing, run))
    return draw_rewards(runs), left_out


def _reward_run(drawing: Drawing, run: Run) -> RewardRun:
    rewards, scores = values_of(run.last_pairs, "rewards/margins"), _scores(drawing, run)
    is_known = np.isfinite(rewards) & np.isfinite(scores)
    if not is_known.any():
        raise ConfigError(f"{run.log_dir / PAIRS_FILE}: no pair has both a reward margin and a score.")
    return RewardRun(run.label, rewards[is_known], scores[is_known])


def _scores(drawing: Drawing, run: Run) -> Column:
    """The data's score of the chosen response less that of the rejected one, ``[P]``; NaN where a row has none."""
    num_pairs = len(run.last_pairs)
    if drawing.rows is not None:
        found = [_score(drawing, number, row) for number, row in enumerate(read_rows(drawing.rows), start=1)]
        check_rows_are_of(drawing.rows, len(found), num_pairs)
        return np.array(found, dtype=np.float64)
    pairs = held_out_pairs(read_config(run.log_dir / "config.yaml"))
    stores = () if pairs is None else pairs[0].stores
    if pairs is None or len(pairs[1]) != num_pairs or any("margin" not in store.manifest.pair_columns for store in stores):
        raise ConfigError(
            f"{run.label}: no scores beside its held-out pairs (a column margin of the prepared data, where they were). Name "
            "the jsonl file the pairs came from: --rows FILE, with --scores FIELD for a field of your own."
        )
    return pairs[0].values_of(pairs[1], ["margin"])["margin"].astype(np.float64)


def _score(drawing: Drawing, number: int, row: Mapping[str, Any]) -> float:
    if drawing.scores is None:
        try:
            difference = score_difference(dict(row))
        except RowFault as fault:
            raise ConfigError(f"--rows {drawing.rows}:{number}: {fault.field}: {fault.message}.") from fault
        return np.nan if difference is None else difference
    value = row.get(drawing.scores)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ConfigError(f"--rows {drawing.rows}:{number}: --scores {drawing.scores}: a number expected, found {value!r}.")
    return np.nan if value is None else float(value)


def plot_training(drawing: Drawing) -> Plotted:
    """Loss, margin and win rate over the training, and what it cost: Figure 7."""
    runs, left_out = _of_each(drawing.runs, lambda run: _training_run(drawing.unit, run))
    return draw_training(runs, drawing.unit, drawing.smoothing), left_out


def _training_run(unit: str, run: Run) -> TrainingRun:
    if not run.steps:
        raise ConfigError(f"{run.log_dir / METRICS_FILE}: no step was recorded.")
    ranks = _num_ranks(run) if unit == "gpu-hours" else 1
    return training_run(run.label, run.steps, run.evaluations, unit, ranks)


def _num_ranks(run: Run) -> int:
    path = run.log_dir / FACTS_FILE
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["ranks"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--x gpu-hours: {path} does not say on how many ranks {run.label} ran. Take --x hours.") from error


def plot_schedule(drawing: Drawing) -> Plotted:
    """RMiPO's schedule and the density of its margins: Figure 8."""
    runs, left_out = _of_each(drawing.runs, margin_run)
    return draw_schedule(runs), left_out


def margin_run(run: Run) -> MarginRun:
    """What is drawn of a run of RMiPO.

    Raises:
        ConfigError: it is not one, or what it said of each held-out pair is not there, or not finite.
    """
    config = run.config
    if config.get("objective") != Rmipo.name:
        raise ConfigError(
            f"{run.log_dir} is a run of objective {config.get('objective')}; only {Rmipo.name} has margins to draw."
        )
    options = RmipoConfig(**{field.name: config[field.name] for field in dataclasses.fields(RmipoConfig) if field.name in config})
    last = run.last_pairs
    if not (np.isfinite(values_of(last, "gamma")) & np.isfinite(gaps_of(last))).any():
        raise ConfigError(f"{run.log_dir / PAIRS_FILE} has no pair with a finite margin; the run has diverged.")
    return MarginRun(f"{run.label} ({options.preset})", Rmipo(options), run.first_pairs, last)


@dataclasses.dataclass(frozen=True)
class FigureKind:
    """A figure that can be asked for.

    Attributes:
        plot: draws it, or raises ConfigError with what the runs lack.
        reads: the names in :class:`Drawing` that it looks at besides the runs.
    """

    plot: Callable[[Drawing], Plotted]
    reads: tuple[str, ...] = ()


FIGURES = {
    "sensitivity": FigureKind(plot_sensitivity),
    "gaps": FigureKind(plot_gaps, ("rows", "category")),
    "wins": FigureKind(plot_wins, ("rows", "category", "wins_by", "judged")),
    "rewards": FigureKind(plot_rewards, ("rows", "scores")),
    "training": FigureKind(plot_training, ("unit", "smoothing")),
    "schedule": FigureKind(plot_schedule),
}
