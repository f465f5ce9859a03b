"""Evaluations of a model beside those of the model it was made from: what changed, number by number."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.evaluation_file import ERROR_COLUMN, Cell, Evaluation, EvaluationTable, parse_evaluation, read_json
from megatron_rmipo.judging.lm_eval_results import find_results, is_lm_eval, parse_lm_eval

# What says how much was evaluated and how sure that is, and not how well.
_ASIDE = {"n", "questions", "answers", "pairs", "longer", "shorter", "equal", "low", "high"}


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
    return own if results is None else [_read_file(results), *own]


def _read_own(path: Path) -> Evaluation | None:
    """An evaluation among other files of a folder; None where a file is something else."""
    found = read_json(path)
    return parse_evaluation(path, found) if isinstance(found, dict) and "kind" in found and "tables" in found else None


def _read_file(path: Path) -> Evaluation:
    found = read_json(path)
    return parse_lm_eval(path, found) if is_lm_eval(found) else parse_evaluation(path, found)


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
    rows: list[list[Cell]] = []
    for key, (value, error) in ours.items():
        of_base, its_error = theirs.get(key, (None, None))
        rows.append([*key[:-1], value, error, of_base, its_error, _change(value, of_base)])
    columns = [*labels, "measure", "model", ERROR_COLUMN, "base", ERROR_COLUMN, "change"]
    return dataclasses.replace(table, columns=columns, rows=rows)


def _is_text(table: EvaluationTable, column: int) -> bool:
    return bool(table.rows) and all(isinstance(row[column], str) for row in table.rows)


def _numbers(table: EvaluationTable) -> dict[tuple[Cell, ...], tuple[Cell, Cell]]:
    """(texts of a row, column, how often these came before) -> number and its standard error."""
    texts = [number for number in range(len(table.columns)) if _is_text(table, number)]
    found: dict[tuple[Cell, ...], tuple[Cell, Cell]] = {}
    seen: Counter[tuple[Cell, ...]] = Counter()
    for row in table.rows:
        names = tuple(row[text] for text in texts)
        for number, column in enumerate(table.columns):
            if number in texts or column == ERROR_COLUMN or column in _ASIDE:
                continue
            has_error = number + 1 < len(row) and table.columns[number + 1] == ERROR_COLUMN
            found[*names, column, seen[names]] = row[number], row[number + 1] if has_error else None
        seen[names] += 1
    return found


def _change(ours: Cell, theirs: Cell) -> float | None:
    if isinstance(ours, int | float) and isinstance(theirs, int | float):
        return ours - theirs
    return None
