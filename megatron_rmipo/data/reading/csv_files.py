"""Files of cells: a header, then a row of text a record, as spreadsheets and pandas write them.

Cells are separated by commas, or by tabs or semicolons where the header is. A cell in double quotes may hold separators, line
ends and, written twice, double quotes. Every cell is text, an empty one null.
"""

from __future__ import annotations

import csv
import itertools
import re
import sys
from collections.abc import Iterator
from typing import IO, NamedTuple

from megatron_rmipo.data.reading.text_files import TextFile
from megatron_rmipo.errors import DataError

_SEPARATORS = {".csv": ",;\t", ".tsv": "\t"}
# As pandas calls a column without a name, such as that of the row numbers which it writes.
_UNNAMED = "Unnamed: {}"
CSV_SUFFIXES = tuple(_SEPARATORS)
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
Record = dict[str, str | None]


class BadRecord(NamedTuple):
    """A row that cannot be used: a key of :data:`megatron_rmipo.data.reading.rows.REASONS`, column, message, and the cells."""

    reason: str
    field: str
    message: str
    cells: list[str]


def csv_rows(file: TextFile, suffix: str) -> Iterator[Record | BadRecord]:
    """The rows behind the header; a :class:`BadRecord` for one that cannot be used.

    Args:
        file: the file.
        suffix: one of :data:`CSV_SUFFIXES`.

    Raises:
        DataError: there is no header, a quote is not closed, or the file cannot be read.
    """
    with file.open_text(newline="") as stream:
        records = _records(stream, file.name, _SEPARATORS[suffix])
        line, header = next(records, (1, []))
        columns = _columns(header, file.name, line)
        for line, cells in records:
            yield _row(columns, cells, line)


def check_header(file: TextFile, suffix: str) -> None:
    """Read the header alone.

    Raises:
        DataError: there is none, or two columns have one name.
    """
    next(csv_rows(file, suffix), None)


def _records(stream: IO[str], name: str, separators: str) -> Iterator[tuple[int, list[str]]]:
    """(first line, cells) of each record that is not a blank line."""
    csv.field_size_limit(sys.maxsize)  # a cell may hold a long conversation
    first = stream.readline()
    # Where one of several may separate, it is the one that the header has.
    separator = max(separators, key=first.count)
    reader = csv.reader(itertools.chain([first], stream), delimiter=separator, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{name}: the row that starts at line {line} is not readable ({error}). A quoted cell ends with a quote, "
                "and a quote within it is written twice."
            ) from None
        if cells is None:
            return
        if cells:
            yield line, cells


def _columns(header: list[str], name: str, line: int) -> list[str]:
    if not any(cell.strip() for cell in header):
        raise DataError(f"{name}: line {line}: a header with the names of the columns is expected.")
    if (found := _ESCAPED_BYTE.search("".join(header))) is not None:
        raise DataError(f"{name}: line {line}: the header holds the byte {_escaped(found)}, which is not UTF-8.")
    columns = [cell or _UNNAMED.format(place) for place, cell in enumerate(header)]
    twice = next((column for column in columns if columns.count(column) > 1), None)
    if twice is not None:
        raise DataError(f"{name}: line {line}: the header names {twice!r} twice.")
    return columns


def _row(columns: list[str], cells: list[str], line: int) -> Record | BadRecord:
    if len(cells) != len(columns):
        message = f"line {line}: {len(cells)} cells, but the header names {len(columns)} columns"
        return BadRecord("malformed", "", message, cells)
    if not "".join(cells).isascii():
        for column, cell in zip(columns, cells, strict=True):
            if (found := _ESCAPED_BYTE.search(cell)) is not None:
                message = (
                    f"line {line}: character {found.start() + 1} of the cell is the byte {_escaped(found)}, which is not UTF-8"
                )
                return BadRecord("not_utf8", column, message, cells)
    return {column: cell or None for column, cell in zip(columns, cells, strict=True)}


def _escaped(found: re.Match[str]) -> str:
    return f"0x{ord(found[0]) - 0xDC00:02x}"
