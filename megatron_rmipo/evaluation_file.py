"""Results of an evaluation as one JSON file, which reports and comparisons read.

``{"kind", "title", "model", "made", "tables": [{"title", "columns", "rows", "note"}], "details"}``: what a table shows stands in
its rows as text, number or null, and whatever else an evaluation knows in its details.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rmipo.errors import ConfigError, DataError

Cell = str | float | int | None
_FIELDS = ("kind", "title", "model", "tables")
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
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        kind: the command it is of, such as ``judge_pairwise``.
        title: what was evaluated, in a few words.
        model: name or directory.
        tables: the results.
        details: settings and whatever else is known.
    """

    kind: str
    title: str
    model: str
    tables: Sequence[EvaluationTable]
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write an evaluation, whole or not at all.

    Raises:
        ConfigError: it cannot be written there.
    """
    made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_whole(path, json.dumps({**dataclasses.asdict(evaluation), "made": made}, indent=1, ensure_ascii=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all, and the folders above it.

    Raises:
        ConfigError: it cannot be written there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}. Name another place.") from error


def read_evaluation(path: Path) -> Evaluation:
    """Read what :func:`write_evaluation`, or another command in the same form, has written.

    Raises:
        DataError: the file cannot be read, or is of another form.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable evaluation ({error}).") from None
    if not isinstance(found, dict) or any(field not in found for field in _FIELDS):
        raise DataError(f"{path}: not an evaluation: it has no {', '.join(_FIELDS)}. Name a file that an evaluation wrote.")
    try:
        tables = [
            EvaluationTable(table["title"], table["columns"], table["rows"], table.get("note", "")) for table in found["tables"]
        ]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: one of its tables lacks {error}. Make the evaluation again.") from None
    for table in tables:
        if any(len(row) != len(table.columns) for row in table.rows):
            raise DataError(f"{path}: a row of the table {table.title!r} has more or fewer cells than there are columns.")
    return Evaluation(found["kind"], found["title"], found["model"], tables, found.get("details", {}))
