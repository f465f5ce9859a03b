"""Several finished runs side by side: what each did to the same held-out pairs, and what it cost."""

from __future__ import annotations

import csv
import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from megatron_rmipo.config.data_flags import parse_blend, parse_split
from megatron_rmipo.config.schema import Config
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.objectives.arguments import objective_of, parse_arguments
from megatron_rmipo.objectives.base import LogpNeeds
from megatron_rmipo.reports.held_out import NUM_PAIRS, Figure, Record, mean_change, plus_minus, recorded, share_of
from megatron_rmipo.reports.reporter import FIRST_PAIRS_FILE, METRICS_FILE
from megatron_rmipo.reports.summary import read_evaluations, read_pairs, read_records

MISSING = "-"
# Column -> (title, format). ``passes`` is text, the others are numbers or missing.
COLUMNS = {
    "held_out_pairs": ("n", ".0f"),
    "accuracy": ("accuracy", ".3f"),
    "accuracy_mean": ("by mean", ".3f"),
    "accuracy_sum": ("by sum", ".3f"),
    "margin": ("margin", ".3f"),
    "gamma_p5": ("gamma p5", ".3f"),
    "gamma_p50": ("gamma p50", ".3f"),
    "gamma_p95": ("gamma p95", ".3f"),
    "loss": ("loss", ".4f"),
    "chosen_change": ("chosen", "+.3f"),
    "rejected_change": ("rejected", "+.3f"),
    "pairs_per_second": ("pairs/s", ".1f"),
    "memory_gib": ("GiB", ".2f"),
    "passes": ("extra passes", ""),
    "pairs": ("pairs", ".0f"),
}
# Columns that are means over the held-out pairs; the csv file has the standard error of each as COLUMN_se.
_MEANS = ("accuracy", "accuracy_mean", "accuracy_sum", "margin", "loss", "chosen_change", "rejected_change")
# What the printed table shows; the csv file has every column.
VIEWS = {
    "margins": ("held_out_pairs", "accuracy", "margin", "gamma_p5", "gamma_p50", "gamma_p95", "loss"),
    "objectives": (
        *("held_out_pairs", "accuracy", "accuracy_mean", "accuracy_sum", "margin", "chosen_change", "rejected_change"),
        *("pairs_per_second", "memory_gib", "passes"),
    ),
}
_STANDS_ON = " n: held-out pairs; +-: standard error, where the run recorded it. A difference within two of them may be chance."
LEGEND = {
    "margins": f"On the held-out pairs after the last step: accuracy and margin by the objective's own reward.{_STANDS_ON}",
    "objectives": (
        "On the held-out pairs after the last step. accuracy, margin: by the objective's own reward, each in its own unit. by "
        "mean, by sum: share of pairs whose chosen response has the higher log-probability, per token or in sum. chosen, "
        "rejected: its change per token since the first evaluation. GiB: peak memory of the first rank." + _STANDS_ON
    ),
}


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What is shown of one run.

    Attributes:
        values: column -> number; None where the objective has no such metric.
        passes: what the objective costs beyond the gradient pass, in words.
        errors: column -> standard error, of the means over held-out pairs; None where it is not known.
    """

    values: Mapping[str, float | None]
    passes: str
    errors: Mapping[str, float | None] = dataclasses.field(default_factory=dict)

    def cell(self, column: str) -> str:
        """The column's value as it is shown."""
        value = self.values.get(column)
        if column == "passes":
            return self.passes
        form = COLUMNS[column][1]
        return MISSING if value is None else format(value, form) + plus_minus(self.errors.get(column), form)


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of (label, run), a run being a folder of the runs."""

    title: str
    rows: Sequence[tuple[str, str]]


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
    pairs = read_pairs(log_dir, after)
    lengths = held_out_lengths(config)
    figures = {
        "accuracy": recorded(after, "rewards/accuracies"),
        "accuracy_mean": chosen_share(pairs),
        "accuracy_sum": chosen_share(pairs, lengths) if lengths is not None else None,
        "margin": recorded(after, "rewards/margins"),
        "loss": recorded(after, "loss"),
        **_changes(before, after, read_pairs(log_dir, before, FIRST_PAIRS_FILE), pairs),
    }
    values = {
        **{column: figure.value if figure is not None else None for column, figure in figures.items()},
        **{f"gamma_{percentile}": after.get(f"gamma/{percentile}") for percentile in ("p5", "p50", "p95")},
        "pairs_per_second": _over(steps, "pairs_per_second", statistics.median),
        "memory_gib": _over(steps, "memory_gib", max),
        "pairs": after.get("consumed_pairs"),
        "held_out_pairs": after.get(NUM_PAIRS, len(pairs) or None),
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


def _changes(before: Record, after: Record, first: Sequence[Record], last: Sequence[Record]) -> dict[str, Figure | None]:
    """How the log-probs changed between two evaluations; the error is of the differences pair by pair, where both are there."""
    changes: dict[str, Figure | None] = {}
    for kind in ("chosen", "rejected"):
        name = f"logps/{kind}"
        start, end = before.get(name), after.get(name)
        paired = mean_change(first, last, name)
        error = paired.error if paired is not None else None
        changes[f"{kind}_change"] = None if start is None or end is None else Figure(end - start, after.get(NUM_PAIRS), error)
    return changes


def _over(records: Sequence[Record], name: str, reduce: Callable[[list[float]], float]) -> float | None:
    found = [record[name] for record in records if record.get(name) is not None]
    return reduce(found) if found else None


def chosen_share(pairs: Sequence[Record], lengths: np.ndarray | None = None) -> Figure | None:
    """Share of held-out pairs whose chosen response has the higher log-probability.

    Args:
        pairs: records with ``logps/chosen`` and ``logps/rejected``, means per token; a pair that lacks one does not count.
        lengths: int ``[P, 2]``, tokens of the chosen and the rejected responses: compare sums instead of means.

    Returns:
        The share; None where no pair has both, or where the lengths are those of other pairs.
    """
    if lengths is not None and len(lengths) != len(pairs):
        return None
    scored = [
        (pair["logps/chosen"], pair["logps/rejected"], *(lengths[number] if lengths is not None else (1, 1)))
        for number, pair in enumerate(pairs)
        if pair.get("logps/chosen") is not None and pair.get("logps/rejected") is not None
    ]
    return share_of([float(a * tokens_a > b * tokens_b) for a, b, tokens_a, tokens_b in scored])


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


def format_table(table: Table, results: Mapping[str, RunResult | None], columns: Sequence[str]) -> str:
    """A Markdown table, padded so that it reads as text too; a run without results has ``-`` in every column."""
    cells = [["", *(COLUMNS[column][0] for column in columns)]]
    for label, run in table.rows:
        result = results[run]
        cells.append([label, *(MISSING if result is None else result.cell(column) for column in columns)])
    # Two at least: the rule of a column of numbers is a dash and a colon.
    widths = [max(2, *(len(row[number]) for row in cells)) for number in range(len(cells[0]))]
    # Text to the left, numbers to the right.
    left = [True, *(column == "passes" for column in columns)]
    rule = ["-" * width if on_left else "-" * (width - 1) + ":" for width, on_left in zip(widths, left, strict=True)]
    lines = []
    for row in [cells[0], rule, *cells[1:]]:
        padded = (
            cell.ljust(width) if on_left else cell.rjust(width) for cell, width, on_left in zip(row, widths, left, strict=True)
        )
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join([f"### {table.title}", "", *lines])


def describe_differences(results: Mapping[str, RunResult | None]) -> str:
    """Warnings where runs were trained, or evaluated, on different numbers of pairs, as after an interruption; else empty."""
    texts = []
    for column, verb in (("pairs", "trained"), ("held_out_pairs", "evaluated")):
        counts: dict[float, list[str]] = {}
        for name, result in results.items():
            if result is not None and result.values.get(column) is not None:
                counts.setdefault(result.values[column] or 0, []).append(name)
        if len(counts) > 1:
            groups = "; ".join(f"{count:.0f}: {', '.join(names)}" for count, names in sorted(counts.items()))
            texts.append(f"Not comparable: these runs were {verb} on different numbers of pairs ({groups}).")
    return "\n\n".join(texts)


def compare_runs(tables: Sequence[Table], results: Mapping[str, RunResult | None], view: str) -> str:
    """The tables of a view as Markdown, without those of which no run has results.

    Raises:
        ConfigError: no run has results.
    """
    shown = [table for table in tables if any(results[run] is not None for _, run in table.rows)]
    if not shown:
        raise ConfigError("none of the runs has come to its last evaluation; train them first.")
    parts = [format_table(table, results, VIEWS[view]) for table in shown]
    return "\n\n".join([*parts, LEGEND[view], *filter(None, [describe_differences(results)])])


def write_csv(file: TextIO, tables: Sequence[Table], results: Mapping[str, RunResult | None]) -> None:
    """Every row of every table with every column, numbers in full; an empty field where there is none."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["table", "row", "run", *COLUMNS, *(f"{column}_se" for column in _MEANS)])
    for table in tables:
        for label, run in table.rows:
            result = results[run]
            if result is not None:
                values = [result.passes if column == "passes" else result.values.get(column) for column in COLUMNS]
                errors = [result.errors.get(column) for column in _MEANS]
                writer.writerow([table.title, label, run, *values, *errors])
