"""Evaluations of a model beside those of the model it was made from: what changed, number by number."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.evaluation_file import ERROR_COLUMN, Cell, Evaluation, EvaluationTable, read_evaluation
from megatron_rmipo.judging.lm_eval_results import find_results, is_lm_eval, read_lm_eval

# What says how much was evaluated, and not how well.
_COUNTS = {"n", "questions", "answers"}


def read_evaluations(paths: Sequence[Path], flag: str) -> list[Evaluation]:
    """The evaluations of files, and of all JSON files in folders; a folder of lm-eval counts with its newest results.

    Raises:
        ConfigError: there is none at a path.
        DataError: a file that was named is damaged, or no evaluation.
    """
    found = []
    for path in paths:
        of_path = _read_folder(path) if path.is_dir() else [_read_file(path)]
        if not of_path:
            raise ConfigError(f"{flag} {path}: no evaluation is there. Name files that an evaluation wrote, or their folder.")
        found += of_path
    return found


def _read_folder(folder: Path) -> list[Evaluation]:
    results = find_results(folder)
    own = [evaluation for path in sorted(folder.glob("*.json")) if (evaluation := _read_own(path)) is not None]
    return own if results is None else [read_lm_eval(results), *own]


def _read_own(path: Path) -> Evaluation | None:
    """An evaluation among other files of a folder; None where a file is something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable JSON ({error}).") from None
    return read_evaluation(path) if isinstance(found, dict) and "kind" in found and "tables" in found else None


def _read_file(path: Path) -> Evaluation:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable evaluation ({error}).") from None
    return read_lm_eval(path) if is_lm_eval(found) else read_evaluation(path)


def side_by_side(model: Sequence[Evaluation], base: Sequence[Evaluation]) -> list[EvaluationTable]:
    """A table for each that both have, of the same kind and title: a row a number, with the change; then the others of the model.

    Raises:
        ConfigError: they have no table in common.
    """
    of_base = {(one.kind, table.title): table for one in base for table in one.tables}
    shared, alone = [], []
    for one in model:
        for table in one.tables:
            other = of_base.get((one.kind, table.title))
            if other is None:
                alone.append(table)
            else:
                shared.append(_compare(table, other))
    if not shared:
        raise ConfigError("--model and --base: no table of one is in the other, so nothing can be compared. Evaluate both alike.")
    return [*shared, *alone]


def _compare(table: EvaluationTable, other: EvaluationTable) -> EvaluationTable:
    ours, theirs = _numbers(table), _numbers(other)
    labels = [column for number, column in enumerate(table.columns) if _is_text(table, number)]
    rows = [
        [*name, *ours[name], *theirs.get(name, (None, None)), _change(ours[name][0], theirs.get(name, (None, None))[0])]
        for name in ours
    ]
    columns = [*labels, "measure", "model", ERROR_COLUMN, "base", ERROR_COLUMN, "change"]
    return EvaluationTable(table.title, columns, rows, table.note)


def _is_text(table: EvaluationTable, column: int) -> bool:
    return bool(table.rows) and all(isinstance(row[column], str) for row in table.rows)


def _numbers(table: EvaluationTable) -> dict[tuple[Cell, ...], tuple[Cell, Cell]]:
    """(texts of a row, column) -> number and its standard error."""
    texts = [number for number in range(len(table.columns)) if _is_text(table, number)]
    found: dict[tuple[Cell, ...], tuple[Cell, Cell]] = {}
    for row in table.rows:
        for number, column in enumerate(table.columns):
            if number in texts or column == ERROR_COLUMN or column in _COUNTS:
                continue
            has_error = number + 1 < len(row) and table.columns[number + 1] == ERROR_COLUMN
            found[*(row[text] for text in texts), column] = row[number], row[number + 1] if has_error else None
    return found


def _change(ours: Cell, theirs: Cell) -> float | None:
    if isinstance(ours, int | float) and isinstance(theirs, int | float):
        return ours - theirs
    return None
