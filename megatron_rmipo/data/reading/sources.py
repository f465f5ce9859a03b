"""Reading rows, in order, from files, directories and Hugging Face data sets.

JSON lines are handed on unparsed: a malformed line is one rejected row, not a failed file, and worker processes do the parsing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_rmipo.data.reading.json_files import (
    BLANK_LINE,
    REMEDY,
    check_is_json,
    count_lines,
    document_rows,
    holds_lines,
    lines,
)
from megatron_rmipo.errors import DataError

FILE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow")
_ROWS_PER_READ = 1024
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


@dataclasses.dataclass(frozen=True)
class Source:
    """An input that can be read more than once.

    Attributes:
        name: as given.
        num_rows: None where only reading everything would tell.
        size_bytes: size of a file, else None.
        note: what its user should know of how it is read, or None.
    """

    name: str
    num_rows: int | None
    size_bytes: int | None
    _rows: Any = dataclasses.field(repr=False, compare=False)
    note: str | None = None

    def __iter__(self) -> Iterator[SourceRow]:
        numbered = enumerate(self._rows(), start=1)
        return (SourceRow(self.name, number, payload) for number, payload in numbered if payload != BLANK_LINE)


def open_source(name: str, split: str | None = None) -> Source:
    """Open a file (jsonl, json, parquet, arrow, each but the last two also gzipped), a directory or a Hugging Face data set name.

    Args:
        name: path or data set name.
        split: which split of a directory or named data set; not for files.

    Raises:
        DataError: it does not exist, cannot be read, or needs a split.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if split is not None:
            raise DataError(f"--split {split}: {name} is a file and has no splits. Leave --split out.")
        return _open_file(path, name)
    if path.is_dir():
        return _open_data_set(name, split, saved=any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json")))
    looks_like_file = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if looks_like_file or Path(name.removesuffix(".gz")).suffix in FILE_SUFFIXES:
        raise DataError(f"--input {name}: no such file or directory.")
    return _open_data_set(name, split, saved=False)


def _open_file(path: Path, name: str) -> Source:
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"{name}: the file is empty.")
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in FILE_SUFFIXES:
        raise DataError(
            f"{name}: {suffix or 'no extension'} is not a known kind of file; "
            f"known: {', '.join(FILE_SUFFIXES)}, .jsonl.gz, .json.gz."
        )
    if suffix == ".parquet":
        return _open_parquet(path, name, size)
    if suffix == ".arrow":
        return Source(name, None, size, lambda: _arrow_rows(path, name))
    return _open_json(path, name, size, is_named_document=suffix == ".json")


def _open_json(path: Path, name: str, size: int, *, is_named_document: bool) -> Source:
    check_is_json(path, name)
    if holds_lines(path, name, is_named_document=is_named_document):
        return Source(name, count_lines(path), size, lambda: lines(path, name))
    rows = document_rows(path, name)
    note = f"{name}: not one object a line, as its name says; read as a JSON document of {len(rows)} rows"
    return Source(name, len(rows), size, lambda: iter(rows), None if is_named_document else note)


def _open_parquet(path: Path, name: str, size: int) -> Source:
    import pyarrow
    import pyarrow.parquet

    with _damage_named(name, "parquet file"):
        num_rows = int(pyarrow.parquet.read_metadata(path).num_rows)

    def rows() -> Iterator[Any]:
        with _damage_named(name, "parquet file"), pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_PER_READ):
                yield from batch.to_pylist()

    return Source(name, num_rows, size, rows)


def _arrow_rows(path: Path, name: str) -> Iterator[Any]:
    """Rows of an Arrow file, in the streaming form that ``datasets`` writes or the random-access form."""
    import pyarrow

    with _damage_named(name, "Arrow file"), pyarrow.memory_map(str(path)) as mapped:
        try:
            batches: Any = pyarrow.ipc.open_stream(mapped)
        except pyarrow.ArrowInvalid:
            file = pyarrow.ipc.open_file(mapped)
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
        for batch in batches:
            yield from batch.to_pylist()


@contextlib.contextmanager
def _damage_named(name: str, kind: str) -> Iterator[None]:
    """Turn what pyarrow raises for a damaged file into an error that names it."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        problem = (str(error).splitlines() or [repr(error)])[0]
        raise DataError(f"{name}: not a readable {kind} ({problem}). {REMEDY}") from None


def _open_data_set(name: str, split: str | None, *, saved: bool) -> Source:
    import datasets

    try:
        found = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except (OSError, ValueError, KeyError, ImportError, datasets.exceptions.DatasetsError) as error:
        first_line = (str(error).splitlines() or [repr(error)])[0]
        raise DataError(
            f"--input {name}: neither a file nor a data set that `datasets` can load ({first_line}).\n"
            "Check the name and the connection, or download it and give its files."
        ) from None
    data = _choose_split(found, name, split)

    def rows() -> Iterator[Any]:
        with _damage_named(name, "data set"):
            for batch in data.iter(batch_size=_ROWS_PER_READ):
                yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))

    return Source(f"{name}[{split}]" if split else name, len(data), None, rows)


def _choose_split(found: Any, name: str, split: str | None) -> Any:
    if not isinstance(found, dict):
        if split is not None:
            raise DataError(f"--split {split}: {name} has no splits. Leave --split out.")
        return found
    if split is None and len(found) == 1:
        return next(iter(found.values()))
    if split not in found:
        problem = f"--split {split}: no such split" if split else "--split is needed"
        raise DataError(f"--input {name}: {problem}. It has: {', '.join(found)}.")
    return found[split]


def load_payload(payload: Any) -> Mapping[str, Any]:
    """The columns of a row.

    Raises:
        ValueError: a line that is not a JSON object.
    """
    try:
        row = _parse_line(payload) if isinstance(payload, bytes) else payload
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, Mapping):
        raise ValueError(f"an object with columns expected, found {'null' if row is None else type(row).__name__}")
    return row


def _parse_line(line: bytes) -> Any:
    """What json.loads makes of a line, in two thirds of its time where nothing is unusual."""
    with contextlib.suppress(ValueError):
        text = line.decode()
        row, end = _read_value(text)
        if text[end:] in _LINE_ENDS:
            return row
    return json.loads(line)


def first_rows(sources: Sequence[Source], limit: int = 200) -> Iterator[Mapping[str, Any]]:
    """The first readable rows, for recognising their format."""
    for source_row in itertools.islice(itertools.chain.from_iterable(sources), limit):
        with contextlib.suppress(ValueError):
            yield load_payload(source_row.payload)
