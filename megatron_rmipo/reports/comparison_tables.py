"""The results of several runs as Markdown tables and as csv."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TextIO

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.reports.comparison import BEFORE, CHANGE, EVALUATED, MISSING, RunResult
from megatron_rmipo.reports.held_out import plus_minus


def _evaluated(title: str, column: str, form: str) -> dict[str, tuple[str, str]]:
    """The columns of a figure that is known before and after."""
    return {column + BEFORE: (f"{title}: before", form), column: ("after", form), column + CHANGE: ("change", "+" + form)}


# Column -> (title, format). ``passes`` is text, the others are numbers or missing. An "after" or a "change" is of the figure
# whose "before" stands before it.
COLUMNS = {
    "held_out_pairs": ("n", ".0f"),
    **_evaluated("accuracy", "accuracy", ".3f"),
    **_evaluated("by mean", "accuracy_mean", ".3f"),
    **_evaluated("by sum", "accuracy_sum", ".3f"),
    **_evaluated("margin", "margin", ".3f"),
    "gamma_p5": ("gamma p5", ".3f"),
    "gamma_p50": ("gamma p50", ".3f"),
    "gamma_p95": ("gamma p95", ".3f"),
    **_evaluated("loss", "loss", ".4f"),
    "chosen_change": ("chosen: change", "+.3f"),
    "rejected_change": ("rejected: change", "+.3f"),
    "pairs_per_second": ("pairs/s", ".1f"),
    "memory_gib": ("GiB", ".2f"),
    "passes": ("extra passes", ""),
    "pairs": ("pairs", ".0f"),
}
# Columns that are means over the held-out pairs; the csv file has the standard errors of each as COLUMN_se and COLUMN_se_seeds.
_MEANS = [column for column in COLUMNS if column.removesuffix(BEFORE).removesuffix(CHANGE) in (*EVALUATED, "chosen", "rejected")]


def _of(*columns: str) -> list[str]:
    return [name for column in columns for name in (column + BEFORE, column, column + CHANGE)]


# What is printed of each table, in parts that fit a screen; the csv file has every column.
VIEWS: Mapping[str, Sequence[Sequence[str]]] = {
    "margins": (
        ("held_out_pairs", *_of("accuracy", "margin")),
        ("gamma_p5", "gamma_p50", "gamma_p95", *_of("loss")),
    ),
    "objectives": (
        ("held_out_pairs", *_of("accuracy", "accuracy_mean", "accuracy_sum")),
        (*_of("margin"), "chosen_change", "rejected_change", "pairs_per_second", "memory_gib", "passes"),
    ),
}
_WHEN = "On the held-out pairs, before the first step and after the last."
_STANDS_ON = (
    "n: held-out pairs; +-: standard error over the held-out pairs; where a row was trained with several seeds, figures are "
    "means over them, and +- is the standard error over seeds, on the same pairs. A difference within two errors may be chance."
)
LEGEND = {
    "margins": f"{_WHEN} accuracy, margin: by the objective's own reward. gamma: after the last step. {_STANDS_ON}",
    "objectives": (
        f"{_WHEN} accuracy, margin: by the objective's own reward, each in its own unit. by mean, by sum: share of pairs whose "
        "chosen response has the higher log-probability, per token or in sum. chosen, rejected: its change per token. GiB: peak "
        f"memory of the first rank. {_STANDS_ON}"
    ),
}


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of (label, run), a run being a folder of the runs."""

    title: str
    rows: Sequence[tuple[str, str]]


def cell(result: RunResult, column: str) -> str:
    """The column's value as it is shown; a value before training stands in every row, without its error."""
    if column == "passes":
        return result.passes
    value, form = result.values.get(column), COLUMNS[column][1]
    if value is None:
        return MISSING
    error = result.error(column) if column in _MEANS and not column.endswith(BEFORE) else None
    return format(value, form) + plus_minus(error, form)


def format_table(table: Table, results: Mapping[str, RunResult | None], columns: Sequence[str]) -> str:
    """A Markdown table, padded so that it reads as text too; a run without results has ``-`` in every column."""
    shown = [results[run] for _, run in table.rows]
    with_seeds = any(result is not None and result.num_seeds > 1 for result in shown)
    cells = [["", *(["seeds"] if with_seeds else []), *(COLUMNS[column][0] for column in columns)]]
    for (label, _), result in zip(table.rows, shown, strict=True):
        seeds = [str(result.num_seeds) if result is not None else MISSING] if with_seeds else []
        cells.append([label, *seeds, *(MISSING if result is None else cell(result, column) for column in columns)])
    # Two at least: the rule of a column of numbers is a dash and a colon.
    widths = [max(2, *(len(row[number]) for row in cells)) for number in range(len(cells[0]))]
    # Text to the left, numbers to the right.
    left = [True, *([False] if with_seeds else []), *(column == "passes" for column in columns)]
    rule = ["-" * width if on_left else "-" * (width - 1) + ":" for width, on_left in zip(widths, left, strict=True)]
    lines = []
    for row in [cells[0], rule, *cells[1:]]:
        padded = (
            text.ljust(width) if on_left else text.rjust(width) for text, width, on_left in zip(row, widths, left, strict=True)
        )
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join(lines)


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
    parts = []
    for table in shown:
        parts += [f"### {table.title}", *(format_table(table, results, columns) for columns in VIEWS[view])]
    return "\n\n".join([*parts, LEGEND[view], *filter(None, [describe_differences(results)])])


def write_csv(file: TextIO, tables: Sequence[Table], results: Mapping[str, RunResult | None]) -> None:
    """Every row of every table with every column, numbers in full; an empty field where there is none."""
    writer = csv.writer(file, lineterminator="\n")
    errors = [f"{column}_se" for column in _MEANS], [f"{column}_se_seeds" for column in _MEANS]
    writer.writerow(["table", "row", "run", "seeds", *COLUMNS, *errors[0], *errors[1]])
    for table in tables:
        for label, run in table.rows:
            result = results[run]
            if result is not None:
                values = [result.passes if column == "passes" else result.values.get(column) for column in COLUMNS]
                over_pairs = [result.errors.get(column) for column in _MEANS]
                over_seeds = [result.seed_errors.get(column) for column in _MEANS]
                writer.writerow([table.title, label, run, result.num_seeds, *values, *over_pairs, *over_seeds])
