"""Verdicts as a table, and tables as text."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from megatron_rmipo.evaluation_file import ERROR_COLUMN, Cell, EvaluationTable
from megatron_rmipo.judging.judgments import Matter
from megatron_rmipo.judging.win_rates import SWAPPED, Rate, length_controlled_win_rate, score_of, win_rate

_COLUMNS = (
    *("questions", "n", "win rate", ERROR_COLUMN, "at equal length", ERROR_COLUMN, "wins", "ties", "losses", "without verdict"),
    *("orders agree", "characters", "baseline's"),
)
_NOTE = (
    "Each pair was judged in both orders; where the verdicts differ, it is a tie. Pairs without a verdict in one of the orders "
    "count in no rate. At equal length: by a logistic regression on the difference in length (docs/evaluation.md)."
)


def result_table(title: str, matters: Sequence[Matter], verdicts: Mapping[str, str | None]) -> EvaluationTable:
    """Win rates of all questions and of each category.

    Args:
        title: of the table.
        matters: what was judged.
        verdicts: name of a judgment -> the verdict on A and B; None where there was none in the answer.
    """
    groups = {"all": list(matters)}
    categories = sorted({matter.category for matter in matters})
    if len(categories) > 1:
        groups |= {name or "none": [matter for matter in matters if matter.category == name] for name in categories}
    return EvaluationTable(title, _COLUMNS, [_row(name, members, verdicts) for name, members in groups.items()], _NOTE)


def _row(name: str, matters: Sequence[Matter], verdicts: Mapping[str, str | None]) -> list[Cell]:
    both = [(verdicts[matter.name(swapped=False)], verdicts[matter.name(swapped=True)]) for matter in matters]
    judged = [
        (matter, score)
        for matter, (first, second) in zip(matters, both, strict=True)
        if (score := score_of(first, second)) is not None
    ]
    scores = [score for _, score in judged]
    lengths = [len(matter.answer) for matter, _ in judged]
    baselines = [len(matter.baseline) for matter, _ in judged]
    plain = win_rate(scores) if scores else None
    controlled = length_controlled_win_rate(scores, lengths, baselines) if scores else None
    agree = [first == SWAPPED[second] for first, second in both if first is not None and second is not None]
    return [
        name,
        len(matters),
        *_cells(plain),
        *_cells(controlled),
        *(scores.count(value) for value in (1.0, 0.5, 0.0)),
        len(matters) - len(scores),
        statistics.fmean(agree) if agree else None,
        round(statistics.fmean(len(matter.answer) for matter in matters), 1),
        round(statistics.fmean(len(matter.baseline) for matter in matters), 1),
    ]


def _cells(rate: Rate | None) -> tuple[float | None, float | None]:
    return (None, None) if rate is None else (rate.value, rate.error)


def format_table(table: EvaluationTable) -> str:
    """A table as Markdown that reads as text, too; an error stands in the cell of its value."""
    columns, rows = _with_errors(table)
    cells = [list(columns), *rows]
    # Two at least: the rule of a column of numbers is a dash and a colon.
    widths = [max(2, *(len(row[number]) for row in cells)) for number in range(len(columns))]
    left = [all(isinstance(row[number], str) for row in table.rows) for number in _value_columns(table)]
    rule = ["-" * width if on_left else "-" * (width - 1) + ":" for width, on_left in zip(widths, left, strict=True)]
    lines = [f"### {table.title}", ""]
    for row in [cells[0], rule, *cells[1:]]:
        padded = (
            text.ljust(width) if on_left else text.rjust(width) for text, width, on_left in zip(row, widths, left, strict=True)
        )
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join([*lines, "", table.note] if table.note else lines)


def _value_columns(table: EvaluationTable) -> list[int]:
    return [number for number, column in enumerate(table.columns) if column != ERROR_COLUMN]


def _with_errors(table: EvaluationTable) -> tuple[list[str], list[list[str]]]:
    """Column names and texts, each error behind its value."""
    numbers = _value_columns(table)
    rows = []
    for row in table.rows:
        texts = []
        for number in numbers:
            text = _text(row[number])
            if number + 1 < len(table.columns) and number + 1 not in numbers and row[number + 1] is not None:
                text += f" +- {_text(row[number + 1])}"
            texts.append(text.replace("|", "\\|"))
        rows.append(texts)
    return [table.columns[number] for number in numbers], rows


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
