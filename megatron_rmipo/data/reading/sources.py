"""Reading rows, in order, from files, directories and Hugging Face data sets.

JSON lines are handed on unparsed: a malformed line is one rejected row, not a failed file, and worker processes do the parsing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_rmipo.data.reading.csv_files import CSV_SUFFIXES, BadRecord, check_header, csv_rows
from megatron_rmipo.data.reading.directories import find_files, is_pattern, kind_of
from megatron_rmipo.data.reading.json_files import document_rows, holds_lines
from megatron_rmipo.data.reading.rows import RowFault
from megatron_rmipo.data.reading.splits import Split, files_of_split
from megatron_rmipo.data.reading.tables import (
    TABLE_SUFFIXES,
    arrow_rows,
    count_parquet_rows,
    data_set_rows,
    is_saved_data_set,
    load_data_set,
    parquet_rows,
)
from megatron_rmipo.data.reading.text_files import BLANK_LINE, COMPRESSED_SUFFIXES, damage_named, open_text_file
from megatron_rmipo.errors import DataError

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
FILE_SUFFIXES = (*_JSON_SUFFIXES, *CSV_SUFFIXES, *TABLE_SUFFIXES)
_LINE_ENDS = ("\n", "\r\n", "")
_read_value = json.JSONDecoder().raw_decode


class SourceRow(NamedTuple):
    """One row where it stands.

    Attributes:
        source: file or data set name.
        number: line of a JSON lines file, else number of the row; from 1.
        payload: a JSON line, or the row's columns; in a JSON list it can be any value, such as null.
    """

    source: str
    number: int
    payload: Any

    @property
    def unit(self) -> str:
        """What ``number`` counts: ``line`` or ``row``."""
        return "line" if isinstance(self.payload, bytes) else "row"


@dataclasses.dataclass(frozen=True)
class Source:
    """An input that can be read more than once.

    Attributes:
        name: as given, or the file of a directory.
        num_rows: None where only reading everything would tell.
        size_bytes: size of a file, else None.
        notes: what its user should know of how it is read.
        part: (first row, the one behind the last) of those that are asked for; None for all.
    """

    name: str
    num_rows: int | None
    size_bytes: int | None
    _rows: Callable[[], Iterator[Any]] = dataclasses.field(repr=False, compare=False)
    notes: tuple[str, ...] = ()
    part: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[SourceRow]:
        numbered = enumerate(self._rows(), start=1)
        rows = (SourceRow(self.name, number, payload) for number, payload in numbered if payload != BLANK_LINE)
        return rows if self.part is None else itertools.islice(rows, *self.part)

    def describe(self) -> dict[str, Any]:
        """What the manifest says of it: its name, its size where it is a file, the rows where they are not all."""
        rows = {} if self.part is None else {"rows": list(self.part)}
        return {"name": self.name, "bytes": self.size_bytes, **rows}


def open_sources(name: str, split: str | None = None, columns: frozenset[str] = frozenset()) -> list[Source]:
    """Open a file, a directory, a pattern for files or a Hugging Face data set.

    Args:
        name: path, pattern or data set name. Of a directory every data file is read, in sorted order.
        split: what ``--split`` says: which split of it, which part of its rows.
        columns: names that the user gave for columns, which tell a row of JSON from a list of rows.

    Returns:
        The files in order, or one data set; at least one row of each is asked for.

    Raises:
        DataError: it does not exist, cannot be read, needs a split, or holds what is not read.
    """
    wanted = Split.parse(split)
    path = Path(name).expanduser()
    if path.is_file():
        if wanted.name is not None and not wanted.is_part:
            raise DataError(f"--split {split}: {name} is a file and has no splits. Leave --split out.")
        sources = _open_files([path], path.parent, name, wanted, columns)
    elif path.is_dir() and is_saved_data_set(path):
        sources = [_open_data_set(name, wanted, is_saved=True)]
    elif path.is_dir() or is_pattern(name):
        found = find_files(name, FILE_SUFFIXES)
        sources = _open_files(found.files, found.root, name, wanted, columns)
        note = f"{name}: {len(sources)} of {len(found.files)} data files"
        if found.left_out:
            note += f"; no data: {', '.join(found.left_out)}"
        sources[0] = dataclasses.replace(sources[0], notes=(note, *sources[0].notes))
    else:
        looks_like_file = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
        if looks_like_file or kind_of(name) in FILE_SUFFIXES:
            raise DataError(f"--input {name}: no such file or directory.")
        sources = [_open_data_set(name, wanted, is_saved=False)]
    return _part_of(sources, wanted, name) if wanted.is_part else sources


def _open_files(paths: Sequence[Path], root: Path, name: str, wanted: Split, columns: frozenset[str]) -> list[Source]:
    chosen = files_of_split([path.relative_to(root) for path in paths], wanted.name, name)
    return [_open_file(path, name if path == Path(name) else str(path), columns) for path in map(paths.__getitem__, chosen)]


def _open_file(path: Path, name: str, columns: frozenset[str]) -> Source:
    with damage_named(name):
        size = path.stat().st_size
    if size == 0:
        raise DataError(f"{name}: the file is empty.")
    suffix = kind_of(path.name)
    if suffix not in FILE_SUFFIXES:
        raise DataError(
            f"{name}: {suffix or 'no extension'} is not a known kind of file; "
            f"known: {', '.join(FILE_SUFFIXES)}; of text also {' and '.join(COMPRESSED_SUFFIXES)}."
        )
    if suffix in TABLE_SUFFIXES and not path.name.lower().endswith(suffix):
        raise DataError(f"{name}: tables are compressed within themselves. Decompress the file, and name it {suffix}.")
    if suffix == ".parquet":
        return Source(name, count_parquet_rows(path, name), size, functools.partial(parquet_rows, path, name))
    if suffix == ".arrow":
        return Source(name, None, size, functools.partial(arrow_rows, path, name))
    file = open_text_file(path, name)
    if suffix in CSV_SUFFIXES:
        check_header(file, suffix)
        return Source(name, None, size, functools.partial(csv_rows, file, suffix))
    is_named_document = suffix == ".json"
    if holds_lines(file, is_named_document=is_named_document):
        return Source(name, file.count_lines(), size, file.lines)
    rows, beside = document_rows(file, columns)
    notes = []
    if not is_named_document:
        notes.append(f"{name}: not one object a line, as its name says; read as a JSON document of {len(rows)} rows")
    if beside:
        notes.append(f"{name}: its one list of objects holds the rows; beside it, and not read: {', '.join(beside)}")
    return Source(name, len(rows), size, rows.__iter__, tuple(notes))


def _open_data_set(name: str, wanted: Split, *, is_saved: bool) -> Source:
    splits = load_data_set(name, is_saved=is_saved)
    if wanted.name is None and len(splits) == 1:
        (data,) = splits.values()
    elif wanted.name in splits:
        data = splits[wanted.name]
    elif None in splits:
        raise DataError(f"--split {wanted.name}: {name} has no splits. Leave --split out, or its name.")
    else:
        problem = f"--split {wanted.name}: no such split" if wanted.name else "--split is needed"
        raise DataError(f"--input {name}: {problem}. It has: {', '.join(map(str, splits))}.")
    return Source(
        f"{name}[{wanted.name}]" if wanted.name else name, len(data), None, functools.partial(data_set_rows, data, name)
    )


def _part_of(sources: Sequence[Source], wanted: Split, name: str) -> list[Source]:
    """The part of the rows of an input that is asked for; its files are read once more to count them."""
    counts: list[int] = []
    for source in sources:
        left = None if wanted.most_rows is None else wanted.most_rows - sum(counts)
        counts.append(sum(1 for _ in itertools.islice(source, left)))
    start, stop = wanted.bounds(sum(counts))
    ends = list(itertools.accumulate(counts))
    if start == stop:
        raise DataError(f"--input {name}: --split asks for rows {start} to {stop} of {ends[-1]}: none.")
    parts = []
    for source, count, end in zip(sources, counts, ends, strict=True):
        first = end - count
        part = (max(start - first, 0), min(stop - first, count))
        if part[0] < part[1]:
            parts.append(dataclasses.replace(source, part=part, num_rows=part[1] - part[0]))
    return parts


def load_payload(payload: Any) -> Mapping[str, Any]:
    """The columns of a row.

    Raises:
        RowFault: there are none: a line that is not a JSON object, or not UTF-8, or a record with too few cells.
    """
    if isinstance(payload, BadRecord):
        raise RowFault(payload.reason, payload.field, payload.message)
    row = _parse_line(payload) if isinstance(payload, bytes) else payload
    if not isinstance(row, Mapping):
        found = "null" if row is None else type(row).__name__
        raise RowFault("malformed", "", f"an object with columns expected, found {found}")
    return row


def _parse_line(line: bytes) -> Any:
    """What json.loads makes of a line of UTF-8, in two thirds of its time where nothing is unusual."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        found = f"byte {error.start + 1} of the line is 0x{line[error.start]:02x}, which is not UTF-8 there"
        raise RowFault("not_utf8", "", f"{found} ({error.reason})") from None
    try:
        with contextlib.suppress(ValueError):
            row, end = _read_value(text)
            if text[end:] in _LINE_ENDS:
                return row
        return json.loads(text.removeprefix("\ufeff"))  # the mark of a file that was appended to another
    except RecursionError:
        raise RowFault("malformed", "", "not a JSON object: nested too deeply") from None
    except ValueError as error:
        raise RowFault("malformed", "", f"not a JSON object: {error}") from None


def first_rows(sources: Sequence[Source], limit: int = 200) -> list[Mapping[str, Any]]:
    """The readable ones of the first rows, for recognising their format.

    Raises:
        DataError: there are none.
    """
    rows, faults = [], []
    for source_row in itertools.islice(itertools.chain.from_iterable(sources), limit):
        try:
            rows.append(load_payload(source_row.payload))
        except RowFault as fault:
            faults.append(f"{source_row.source}: {source_row.unit} {source_row.number}: {fault.message}")
    if not rows and not faults:
        raise DataError(f"{', '.join(source.name for source in sources[:3])}: no rows.")
    if not rows:
        raise DataError(f"none of the first {len(faults)} rows is readable; the first of them:\n  {faults[0]}")
    return rows
