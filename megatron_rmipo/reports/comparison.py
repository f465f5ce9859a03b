"""Several finished runs side by side: what each did to the same held-out pairs, and what it cost."""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_rmipo.config.flags.data import parse_blend, parse_split
from megatron_rmipo.config.schema import Config
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.objectives.arguments import objective_of, parse_arguments
from megatron_rmipo.objectives.base import LogpNeeds
from megatron_rmipo.reports.held_out import NUM_PAIRS, Figure, Record, mean_change, recorded, share_of, standard_error
from megatron_rmipo.reports.reporter import FIRST_PAIRS_FILE, METRICS_FILE
from megatron_rmipo.reports.summary import read_evaluations, read_pairs, read_records

MISSING = "-"
# Figures that are means over the held-out pairs, known before training and after it. Each has columns of its own name (after), of
# that name with _BEFORE, and with _CHANGE.
EVALUATED = ("accuracy", "accuracy_mean", "accuracy_sum", "margin", "loss")
BEFORE, CHANGE = "_before", "_change"
# Where the record of an evaluation has them; the shares by log-probability come from the pairs.
_RECORDED = {"accuracy": "rewards/accuracies", "margin": "rewards/margins", "loss": "loss"}
_PERCENTILES = ("p5", "p50", "p95")
# A further seed of a run stands beside it, in NAME.seed-N.
_SEED = re.compile(r"(.+)\.seed-[0-9]+")


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What is shown of a run, or of the runs of several seeds.

    Attributes:
        values: column -> number, of several seeds the mean; None where the objective has no such metric.
        passes: what the objective costs beyond the gradient pass, in words.
        errors: column -> standard error over the held-out pairs, of the means over them; None where it is not known. Of several
            seeds it is their mean: all saw the same pairs.
        seed_errors: column -> standard error over the seeds; empty for a single run.
        num_seeds: runs that it stands for.
    """

    values: Mapping[str, float | None]
    passes: str
    errors: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    seed_errors: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    num_seeds: int = 1

    def error(self, column: str) -> float | None:
        """The error that is shown: over the seeds where there are several, else over the held-out pairs."""
        return (self.seed_errors if self.num_seeds > 1 else self.errors).get(column)


def name_without_seed(name: str) -> str:
    """Of which row a run's folder is a seed: ``dpo.seed-1235`` -> ``dpo``."""
    found = _SEED.fullmatch(name)
    return found[1] if found else name


def read_row(runs: Path, name: str) -> RunResult | None:
    """The results of the run ``runs/name`` and of its further seeds ``runs/name.seed-N``; those not yet complete are left out.

    Raises:
        RmipoError: records or a configuration are damaged.
    """
    further = sorted(path for path in runs.glob("*.seed-*") if name_without_seed(path.name) == name)
    found = [result for path in (runs / name, *further) if (result := read_run(path)) is not None]
    return mean_of_seeds(found) if found else None


def mean_of_seeds(results: Sequence[RunResult]) -> RunResult:
    """The means over the runs of several seeds, with their standard errors; a single run as it is."""
    if len(results) == 1:
        return results[0]

    def mean(columns: Sequence[Mapping[str, float | None]], column: str) -> float | None:
        found = [value for each in columns if (value := each.get(column)) is not None]
        return statistics.fmean(found) if len(found) == len(columns) else None

    values = {column: mean([result.values for result in results], column) for column in results[0].values}
    errors = {column: mean([result.errors for result in results], column) for column in results[0].errors}
    seed_errors = {
        column: standard_error([result.values[column] or 0.0 for result in results])
        for column, value in values.items()
        if value is not None
    }
    return RunResult(values, results[0].passes, errors, seed_errors, len(results))


def read_run(directory: Path) -> RunResult | None:
    """The results of the run that saved to ``directory``; None where it was not started or has not come to its last evaluation.

    Raises:
        RmipoError: its records or its configuration are damaged.
    """
    log_dir = directory / "logs"
    if not (log_dir / METRICS_FILE).exists():
        return None
    records = list(read_records(log_dir / METRICS_FILE))
    if sum(record.get("kind") == "eval" for record in records) < 2:
        return None
    config = read_config(log_dir / "config.yaml")
    evaluations = read_evaluations(log_dir)
    steps = [record for record in records if record.get("kind") == "train"]
    before, after = evaluations[0], evaluations[-1]
    first, last = read_pairs(log_dir, before, FIRST_PAIRS_FILE), read_pairs(log_dir, after)
    figures = {
        **_recorded_figures(before, after, first, last),
        **_shares(first, last, held_out_lengths(config)),
        **_logp_changes(before, after, first, last),
    }
    values = {
        **{column: figure.value if figure is not None else None for column, figure in figures.items()},
        **{f"gamma_{percentile}": after.get(f"gamma/{percentile}") for percentile in _PERCENTILES},
        "pairs_per_second": _over(steps, "pairs_per_second", statistics.median),
        "memory_gib": _over(steps, "memory_gib", max),
        "pairs": after.get("consumed_pairs"),
        "held_out_pairs": after.get(NUM_PAIRS, len(last) or None),
    }
    errors = {column: figure.error if figure is not None else None for column, figure in figures.items()}
    return RunResult(values, describe_passes(objective_of(config).needs), errors)


def read_config(path: Path) -> Config:
    """The configuration of a run.

    Raises:
        ConfigError: it is missing or damaged.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: the run's configuration is missing. Name the directory the run saved to (--save).")
    return parse_arguments(["--config", str(path)])


def _recorded_figures(before: Record, after: Record, first: Sequence[Record], last: Sequence[Record]) -> dict[str, Figure | None]:
    """What the evaluations themselves recorded, before, after, and the change."""
    figures: dict[str, Figure | None] = {}
    for column, name in _RECORDED.items():
        start, end = recorded(before, name), recorded(after, name)
        figures |= {column: end, column + BEFORE: start, column + CHANGE: _change(start, end, mean_change(first, last, name))}
    return figures


def _shares(first: Sequence[Record], last: Sequence[Record], lengths: np.ndarray | None) -> dict[str, Figure | None]:
    """The shares of pairs told apart by log-probability per token and in sum, before, after, and the change."""
    figures: dict[str, Figure | None] = {}
    for column in ("accuracy_mean", "accuracy_sum"):
        if column == "accuracy_sum":
            told = [told_apart(pairs, lengths) if lengths is not None else [] for pairs in (first, last)]
        else:
            told = [told_apart(pairs) for pairs in (first, last)]
        start, end = (share_of([value for value in values if value is not None]) for values in told)
        first_told, last_told = ([{"told": value} for value in values] for values in told)
        paired = mean_change(first_told, last_told, "told")
        figures |= {column: end, column + BEFORE: start, column + CHANGE: _change(start, end, paired)}
    return figures


def _change(start: Figure | None, end: Figure | None, paired: Figure | None) -> Figure | None:
    """From one evaluation to the other; the error is of the differences pair by pair, where both are there."""
    if start is None or end is None:
        return None
    return Figure(end.value - start.value, end.num_pairs, paired.error if paired is not None else None)


def _logp_changes(before: Record, after: Record, first: Sequence[Record], last: Sequence[Record]) -> dict[str, Figure | None]:
    changes = {}
    for kind in ("chosen", "rejected"):
        name = f"logps/{kind}"
        changes[kind + CHANGE] = _change(recorded(before, name), recorded(after, name), mean_change(first, last, name))
    return changes


def _over(records: Sequence[Record], name: str, reduce: Callable[[list[float]], float]) -> float | None:
    found = [record[name] for record in records if record.get(name) is not None]
    return reduce(found) if found else None


def told_apart(pairs: Sequence[Record], lengths: np.ndarray | None = None) -> list[float | None]:
    """Of each held-out pair whether its chosen response has the higher log-probability, 1 or 0.

    Args:
        pairs: records with ``logps/chosen`` and ``logps/rejected``, means per token.
        lengths: int ``[P, 2]``, tokens of the chosen and the rejected responses: compare sums instead of means.

    Returns:
        None for a pair that lacks one of the two; empty where the lengths are those of other pairs.
    """
    if lengths is not None and len(lengths) != len(pairs):
        return []
    told: list[float | None] = []
    for number, pair in enumerate(pairs):
        chosen, rejected = pair.get("logps/chosen"), pair.get("logps/rejected")
        tokens = lengths[number] if lengths is not None else (1, 1)
        told.append(None if chosen is None or rejected is None else float(chosen * tokens[0] > rejected * tokens[1]))
    return told


def held_out_lengths(config: Config) -> np.ndarray | None:
    """Scored tokens of the held-out responses of a run, int ``[P, 2]``; None where the prepared data are no longer there."""
    found = held_out_pairs(config)
    return None if found is None else found[0].lengths_of(found[1])[:, 1:]


def held_out_pairs(config: Config) -> tuple[PairCollection, np.ndarray] | None:
    """The data with the held-out pairs of a run, their numbers in it ``[P]``; None where prepared data are no longer there."""
    data = config.data
    flags = data.valid_data_path or data.data_path
    blend = parse_blend(flags)
    try:
        parts = [PairCollection([PairStore(prefix)]) for _, prefix in blend]
    except (DataError, OSError):
        return None
    weights = [weight for weight, _ in blend] if len(blend) > 1 else None
    if not data.valid_data_path:
        if not data.split:
            return None
        share = parse_split(data.split)[1]
        parts, weights = [part.split(share)[1] for part in parts], None
    pairs = PairCollection.combine(parts, weights)
    return pairs, np.arange(min(len(pairs), config.training.eval_pairs or len(pairs)))


def describe_passes(needs: LogpNeeds) -> str:
    """What an objective costs beyond the gradient pass over its responses, in a few words."""
    parts = []
    if needs.unconditional is not None:
        parts.append("log p(y)")
    if needs.perturbation is not None:
        parts.append("resident reference")
    elif needs.reference:
        parts.append("reference, once")
    if needs.mismatched:
        parts.append("mismatched pairs")
    if needs.batch:
        parts.append("whole batch before")
    return " + ".join(parts) or MISSING
