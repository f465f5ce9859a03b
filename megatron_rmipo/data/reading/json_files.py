"""Files of JSON, plain or gzipped: one object a line, one document, or objects over several lines.

What is in a file decides, more than its name. Lines are handed on unparsed; the other two are read whole.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_rmipo.data.reading.rows import COLUMN_NAMES
from megatron_rmipo.errors import DataError

BLANK_LINE = b""
REMEDY = "Fetch or make the file again."
_ROW_COLUMNS = frozenset(COLUMN_NAMES)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# The first object of a file is looked for in so many bytes, where it does not end on its line.
_HEAD_BYTES = 1 << 24
_FILLED = re.compile(r"\S")
_UTF_16 = ("is not UTF-8 but UTF-16 or UTF-32", "Convert it, as with iconv -f UTF-16 -t UTF-8.")
# What other files start with -> what they are, and the remedy.
_OTHER_STARTS = {
    b"\xff\xfe": _UTF_16,
    b"\xfe\xff": _UTF_16,
    b"\x00\x00\xfe\xff": _UTF_16,
    b"PK\x03\x04": ("is a zip archive", "Unpack it."),
    b"\x28\xb5\x2f\xfd": ("is compressed by zstd", "Decompress it, with zstd -d, or use gzip."),
    b"\xfd7zXZ": ("is compressed by xz", "Decompress it, with xz -d, or use gzip."),
    b"BZh": ("is compressed by bzip2", "Decompress it, with bzip2 -d, or use gzip."),
    b"PAR1": ("is a parquet file", "Name it .parquet."),
    b"ARROW1": ("is an Arrow file", "Name it .arrow."),
    b"version https://git-lfs": ("is a pointer of git-lfs, without the data", "Fetch those with git lfs pull."),
    b"<": ("is HTML or XML, not JSON", "Fetch the file itself, not the page that shows it."),
}


def check_is_json(path: Path, name: str) -> None:
    """Refuse what cannot be JSON, by its first bytes.

    Raises:
        DataError: naming what it is, and the remedy.
    """
    with _damage_named(name), _open_stream(path) as stream:
        start = stream.read(64)
    if not start:
        raise DataError(f"{name}: the file is empty.")
    for other, (what, remedy) in _OTHER_STARTS.items():
        if start.startswith(other):
            raise DataError(f"{name}: the file {what}. {remedy}")
    # Half of an ASCII character's bytes are zero in UTF-16, whether there is a byte order mark or not.
    if b"\x00" in start[:4]:
        raise DataError(f"{name}: the file {_UTF_16[0]}. {_UTF_16[1]}")


def holds_lines(path: Path, name: str, *, is_named_document: bool) -> bool:
    """Whether a file has one object a line.

    Args:
        path: the file.
        name: as given.
        is_named_document: whether it is called ``.json``: a single line is a document then, and a first line that is no JSON is
            damage of the document rather than of a row.

    Raises:
        DataError: it is blank, or cannot be read.
    """
    with _damage_named(name), _open_stream(path) as stream:
        filled = (line for line in stream if line.removeprefix(_BYTE_ORDER_MARK).strip())
        first = next(filled, b"").removeprefix(_BYTE_ORDER_MARK)
        if not first:
            raise DataError(f"{name}: the file is empty but for blank lines.")
        has_more = next(filled, None) is not None
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        is_document = is_named_document or first.lstrip().startswith(b"[") or _first_object_spans_lines(path, name)
        return not is_document
    return has_more or not (is_named_document or isinstance(value, list))


def _first_object_spans_lines(path: Path, name: str) -> bool:
    with _damage_named(name), _open_stream(path) as stream:
        head = stream.read(_HEAD_BYTES).removeprefix(_BYTE_ORDER_MARK).decode("utf-8", "replace").lstrip()
    # The first line alone was no JSON: an object that is one all the same ends on a later line.
    with contextlib.suppress(ValueError, RecursionError):
        return isinstance(json.JSONDecoder().raw_decode(head)[0], dict)
    return False


def lines(path: Path, name: str) -> Iterator[bytes]:
    """Lines of a file; an empty one stands for blank ones, so that numbers stay those of the file.

    Raises:
        DataError: it cannot be read to its end.
    """
    with _damage_named(name), _open_stream(path) as stream:
        for number, line in enumerate(stream):
            if number == 0:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            yield line if line.strip() else BLANK_LINE


def count_lines(path: Path) -> int | None:
    """Lines of a plain file; None for a compressed one, which would cost as much as reading it."""
    with open(path, "rb") as stream:
        if stream.read(2) == b"\x1f\x8b":
            return None
        stream.seek(0)
        blocks = iter(lambda: stream.read(1 << 20), b"")
        count, last = 0, b""
        for block in blocks:
            count, last = count + block.count(b"\n"), block[-1:]
        return count + (last != b"\n")


def document_rows(path: Path, name: str) -> list[Any]:
    """The rows of a JSON document, or of objects that follow each other.

    Raises:
        DataError: it cannot be read, is no JSON, or holds no rows.
    """
    with _damage_named(name), _open_stream(path) as stream:
        text = stream.read().decode("utf-8-sig")
    values = _values(text, name)
    if len(values) > 1:
        return values
    document = values[0]
    if isinstance(document, list):
        return document
    lists = {key: value for key, value in document.items() if isinstance(value, list)} if isinstance(document, dict) else {}
    if len(lists) == 1 and not _ROW_COLUMNS & lists.keys():
        return next(iter(lists.values()))
    if isinstance(document, dict) and _ROW_COLUMNS & document.keys():
        return [document]
    raise DataError(
        f"{name}: a list of rows is expected, or an object holding one list; "
        f"found {type(document).__name__} with {list(lists) or 'no list'}."
    )


def _values(text: str, name: str) -> list[Any]:
    """The JSON values of a text, one after the other."""
    decoder, values, place = json.JSONDecoder(), [], _next_filled(text, 0)
    while place < len(text):
        try:
            value, end = decoder.raw_decode(text, place)
        except RecursionError:
            raise DataError(f"{name}: nested too deeply to be rows. {REMEDY}") from None
        except json.JSONDecodeError as error:
            raise DataError(
                f"{name}: line {error.lineno}: not valid JSON ({error.msg}). A file with one object a line is named .jsonl."
            ) from None
        values.append(value)
        place = _next_filled(text, end)
    return values


def _next_filled(text: str, place: int) -> int:
    filled = _FILLED.search(text, place)
    return filled.start() if filled else len(text)


def _open_stream(path: Path) -> IO[bytes]:
    with open(path, "rb") as stream:
        compressed = stream.read(2) == b"\x1f\x8b"
    return io.BufferedReader(gzip.open(path, "rb")) if compressed else open(path, "rb")


@contextlib.contextmanager
def _damage_named(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{name}: could not be read to its end ({error}). {REMEDY}") from None
