"""Results of an evaluation as one JSON file, which reports and comparisons read.

``{"kind", "title", "model", "made", "tables": [{"title", "columns", "rows", "note"}], "details"}``: what a table shows stands in
its rows as text, number or null, and whatever else an evaluation knows in its details.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.whole_files import replace_file

Cell = str | float | int | None
_TEXTS = ("kind", "title", "model")
# A column of this name holds the standard error of the column before it.
ERROR_COLUMN = "+-"


@dataclasses.dataclass(frozen=True)
class EvaluationTable:
    """A table of results.

    Attributes:
        title: above it.
        columns: names of the columns; ``+-`` is the standard error of the one before it.
        rows: as many cells each.
        note: what a reader should know, a sentence or more; may be empty.
        is_detail: whether it is for files alone, too long for a screen.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    is_detail: bool = False


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        kind: the command it is of, such as ``judge_pairwise``.
        title: what was evaluated, in a few words.
        model: name or directory.
        tables: the results.
        details: settings and whatever else is known.
        made: when it was written, in ISO form; empty before.
    """

    kind: str
    title: str
    model: str
    tables: Sequence[EvaluationTable]
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    made: str = ""


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write an evaluation, whole or not at all.

    Raises:
        ConfigError: it cannot be written there.
    """
    made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    content = dataclasses.asdict(dataclasses.replace(evaluation, made=made))
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all, and the folders above it.

    Raises:
        ConfigError: it cannot be written there.
    """
    try:
        replace_file(path, [text])
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}. Name another place.") from error


def read_evaluation(path: Path) -> Evaluation:
    """Read what :func:`write_evaluation` has written.

    Raises:
        DataError: the file cannot be read, or is of another form.
    """
    return parse_evaluation(path, read_json(path))


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: it cannot be read, or is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable evaluation ({error}). Name a file that an evaluation wrote.") from None


def parse_evaluation(path: Path, found: Any) -> Evaluation:
    """The evaluation in the content of a file.

    Raises:
        DataError: it is of another form.
    """
    fields = (*_TEXTS, "tables")
    if not isinstance(found, dict) or not all(isinstance(found.get(name), str) for name in _TEXTS) or "tables" not in found:
        raise DataError(f"{path}: not an evaluation: it lacks one of {', '.join(fields)}. Name a file that an evaluation wrote.")
    try:
        tables = [
            EvaluationTable(
                table["title"], table["columns"], table["rows"], table.get("note", ""), is_detail=table.get("is_detail", False)
            )
            for table in found["tables"]
        ]
        wrong = [table.title for table in tables if not all(_is_row(row, table) for row in table.rows)]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: one of its tables has no title, columns or rows ({error!r}). Evaluate again.") from None
    if wrong:
        raise DataError(
            f"{path}: a row of the table {wrong[0]!r} has more or fewer cells than there are columns, or one that is neither "
            "text nor a number. Evaluate again."
        )
    return Evaluation(
        found["kind"], found["title"], found["model"], tables, found.get("details", {}), made=str(found.get("made", ""))
    )


def _is_row(row: Sequence[Cell], table: EvaluationTable) -> bool:
    return len(row) == len(table.columns) and all(isinstance(cell, Cell) for cell in row)
