"""Files of JSON: one object a line, one document, or objects over several lines.

What is in a file decides, more than its name. Lines are handed on unparsed; the other two are read whole.
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

from megatron_rmipo.data.reading.rows import COLUMN_NAMES
from megatron_rmipo.data.reading.text_files import BLANK_LINE, REMEDY, TextFile
from megatron_rmipo.errors import DataError

_ROW_COLUMNS = frozenset(COLUMN_NAMES)
_MESSAGE_KEYS = frozenset(("role", "from"))
# The first object of a file is looked for in so many bytes, where it does not end on its line.
_HEAD_BYTES = 1 << 24
_FILLED = re.compile(r"\S")


def holds_lines(file: TextFile, *, is_named_document: bool) -> bool:
    """Whether a file has one object a line.

    Args:
        file: the file.
        is_named_document: whether it is called ``.json``: a single line is a document then, and a first line that is no JSON is
            damage of the document rather than of a row.

    Raises:
        DataError: it is blank, or cannot be read.
    """
    filled = (line for line in file.lines() if line != BLANK_LINE)
    first = next(filled, BLANK_LINE)
    if first == BLANK_LINE:
        raise DataError(f"{file.name}: the file is empty but for blank lines.")
    has_more = next(filled, None) is not None
    try:
        value = json.loads(first.decode())
    except (ValueError, RecursionError):
        is_document = is_named_document or first.lstrip().startswith(b"[") or _first_object_spans_lines(file)
        return not is_document
    return has_more or not (is_named_document or isinstance(value, list))


def _first_object_spans_lines(file: TextFile) -> bool:
    head = file.head(_HEAD_BYTES).lstrip()
    # The first line alone was no JSON: an object that is one all the same ends on a later line.
    with contextlib.suppress(ValueError, RecursionError):
        return isinstance(json.JSONDecoder().raw_decode(head)[0], dict)
    return False


def document_rows(file: TextFile, columns: frozenset[str] = frozenset()) -> tuple[list[Any], list[str]]:
    """The rows of a JSON document, or of objects that follow each other.

    A document is a list of rows, an object that holds one such list, or a single row.

    Args:
        file: the file.
        columns: names that the user gave for columns: an object with one of them, or of ours, is a row.

    Returns:
        The rows, and what an object holds beside its list of rows.

    Raises:
        DataError: it cannot be read, is no JSON, or holds no rows.
    """
    values = _values(file.read(), file.name)
    if len(values) > 1:
        return values, []
    document = values[0]
    if isinstance(document, list):
        return document, []
    if not isinstance(document, dict):
        raise DataError(f"{file.name}: a list of rows is expected, or an object; found {type(document).__name__}.")
    if (_ROW_COLUMNS | columns) & document.keys():
        return [document], []
    lists = {key: value for key, value in document.items() if _holds_rows(value)}
    if len(lists) > 1:
        raise DataError(f"{file.name}: several lists of rows: {', '.join(lists)}. Keep each in a file of its own.")
    if not lists:
        return [document], []
    return next(iter(lists.values())), [key for key in document if key not in lists]


def _holds_rows(value: Any) -> bool:
    """Whether a value is a list of objects that are no messages."""
    objects = [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
    return bool(objects) and _MESSAGE_KEYS.isdisjoint(objects[0])


def _values(text: str, name: str) -> list[Any]:
    """The JSON values of a text, one after the other."""
    decoder, values, place = json.JSONDecoder(), [], _next_filled(text, 0)
    while place < len(text):
        try:
            value, end = decoder.raw_decode(text, place)
        except RecursionError:
            raise DataError(f"{name}: nested too deeply to be rows. {REMEDY}") from None
        except json.JSONDecodeError as error:
            rows = "the objects of a file stand one on a line, without commas between them, or in one list"
            raise DataError(f"{name}: line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); {rows}.") from None
        values.append(value)
        place = _next_filled(text, end)
    return values


def _next_filled(text: str, place: int) -> int:
    filled = _FILLED.search(text, place)
    return filled.start() if filled else len(text)
