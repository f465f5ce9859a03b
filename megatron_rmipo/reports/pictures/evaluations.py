"""Win rates that a judge found, out of the files in which evaluations leave their results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rmipo.evaluation_file import ERROR_COLUMN, EvaluationTable, read_evaluation
from megatron_rmipo.reports.pictures.wins import DEVIATIONS, WinRate

JUDGED = "judge_pairwise"
# Columns of a judge's table: the rate with ties as half of a win, its standard error beside it, and how often there was what.
_RATE, _COUNTS = "win rate", ("wins", "ties", "losses")


def judged_wins(label: str, paths: Sequence[Path]) -> list[WinRate]:
    """The win rates among some evaluations, a bar for each row of a table that has them.

    Args:
        label: what their model is called; empty for its own name. The name of the file is added where several were judged.
        paths: of evaluations of any kind; those without a judge say nothing.

    Raises:
        DataError: one cannot be read, or is no evaluation.
    """
    evaluations = {path: read_evaluation(path) for path in paths}
    judged = {path: evaluation for path, evaluation in evaluations.items() if evaluation.kind == JUDGED}
    rates = []
    for path, evaluation in judged.items():
        name = label or Path(evaluation.model or path.stem).name
        name += f" ({path.stem})" if len(judged) > 1 else ""
        for table in evaluation.tables:
            if _RATE in table.columns:
                rates += _rates_of(name, table)
    return rates


def _rates_of(label: str, table: EvaluationTable) -> list[WinRate]:
    columns = list(table.columns)
    place = columns.index(_RATE)
    has_error = columns[place + 1 : place + 2] == [ERROR_COLUMN]
    rates = []
    # A judge's tables hold numbers in these columns.
    rows: Sequence[Sequence[Any]] = table.rows
    for row in rows:
        rate = row[place]
        # Of questions that got no verdict.
        if rate is None:
            continue
        counts = [row[columns.index(name)] for name in _COUNTS] if set(_COUNTS) <= set(columns) else None
        total = sum(counts) if counts else None
        ties = counts[1] / total if counts and total else 0.0
        beyond = DEVIATIONS * row[place + 1] if has_error and row[place + 1] is not None else None
        interval = None if beyond is None else (max(0.0, rate - beyond), min(1.0, rate + beyond))
        category = " ".join(cell for cell in row if isinstance(cell, str)) or "all"
        rates.append(WinRate(label, category, rate - ties / 2.0, ties, interval, total))
    return rates
