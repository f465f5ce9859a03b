"""``--columns``: which of a row's values stand under our names.

A path reaches into nested values: ``answers.good``, ``completions.0.text``, ``messages[-1].content``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rmipo.data.reading.rows import COLUMN_NAMES, Row
from megatron_rmipo.errors import DataError

_INDEX = re.compile(r"-?\d+")


def rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with the columns of ``--columns`` under our names.

    A mapping that a path reaches into is taken apart, so that what no path takes of it is a column, too: ``answers.note``.

    Args:
        row: column -> value.
        columns: ours -> theirs: the name of a column, else a path to a nested value.
    """
    if not columns:
        return row
    taken: dict[str, Any] = {}
    parted: dict[str, dict[str, Any]] = {}
    for ours, theirs in columns.items():
        if theirs in row:
            taken[ours] = row[theirs]
            continue
        first, *steps = _steps(theirs)
        whole = _opened(row.get(first))
        taken[ours] = _nested(whole, steps)
        if isinstance(whole, dict) and steps:
            parted.setdefault(first, dict(whole)).pop(steps[0], None)
    used = {*columns, *columns.values(), *parted}
    renamed = {key: value for key, value in row.items() if key not in used}
    for first, rest in parted.items():
        renamed |= {f"{first}.{key}": value for key, value in rest.items()}
    return renamed | {ours: value for ours, value in taken.items() if value is not None}


@functools.cache
def _steps(path: str) -> tuple[str, ...]:
    """``messages[-1].content`` and ``messages.-1.content`` -> ``messages``, ``-1``, ``content``."""
    return tuple(re.sub(r"\[(-?\d+)\]", r".\1", path).split("."))


def _nested(value: Any, steps: Sequence[str]) -> Any:
    """What the steps lead to, None where one leads nowhere."""
    for step in steps:
        value = _opened(value)
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and _INDEX.fullmatch(step) and -len(value) <= int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def _opened(value: Any) -> Any:
    """A value, or what it holds where it is JSON text."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def parse_columns(text: str | None) -> dict[str, str]:
    """``prompt=instruction,chosen=good`` -> ours to theirs.

    Raises:
        DataError: not of that form, or an unknown name on the left.
    """
    columns: dict[str, str] = {}
    for item in (text or "").split(","):
        if not item.strip():
            continue
        ours, equals, theirs = (part.strip() for part in item.partition("="))
        if not (ours and equals and theirs) or ours not in COLUMN_NAMES:
            raise DataError(f"--columns: {item.strip()!r} is not NAME=COLUMN with NAME one of {', '.join(COLUMN_NAMES)}.")
        if ours in columns:
            raise DataError(f"--columns: {ours} is given twice.")
        columns[ours] = theirs
    return columns


def column_names(columns: Mapping[str, str]) -> frozenset[str]:
    """The columns of a row that ``--columns`` reads, whole or in part."""
    return frozenset(columns.values()) | {_steps(theirs)[0] for theirs in columns.values()}


def require_columns(rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Check that each column of ``--columns`` is in at least one of the first rows.

    Raises:
        DataError: naming the columns there are.
    """
    for ours, theirs in columns.items():
        if rows and not any(ours in rename_columns(row, {ours: theirs}) for row in rows):
            raise DataError(f"--columns {ours}={theirs}: no such column. The rows have: {', '.join(rows[0])}.")
