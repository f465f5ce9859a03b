"""Files of text, plain or compressed, in UTF-8 or in an encoding that they name themselves.

Nothing is decoded by guess. UTF-16 and UTF-32 are read where a byte order mark says so. A file most of whose first lines are in
another encoding is refused, with what it may be; a single line that is not UTF-8 is left as it is, for its row to be rejected.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from megatron_rmipo.errors import DataError

BLANK_LINE = b""
REMEDY = "Fetch or make the file again."
COMPRESSED_SUFFIXES = (".gz", ".zst")
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_HEAD_BYTES = 1 << 18
# UTF-32 first: the little-endian mark of UTF-16 is the beginning of that of UTF-32.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# What other files start with -> what they are, and the remedy.
_OTHER_STARTS = {
    b"PK\x03\x04": ("is a zip archive", "Unpack it."),
    b"\xfd7zXZ": ("is compressed by xz", "Decompress it, with xz -d, or use gzip or zstd."),
    b"BZh": ("is compressed by bzip2", "Decompress it, with bzip2 -d, or use gzip or zstd."),
    b"PAR1": ("is a parquet file", "Name it .parquet."),
    b"ARROW1": ("is an Arrow file", "Name it .arrow."),
    b"version https://git-lfs": ("is a pointer of git-lfs, without the data", "Fetch those with git lfs pull."),
    b"<": ("is HTML or XML", "Fetch the file itself, not the page that shows it."),
}
# By iconv's names, where a text has whole words beyond ASCII, and where it has single letters.
_OF_WORDS = ("GBK", "BIG5", "SHIFT_JIS", "EUC-KR", "WINDOWS-1251", "KOI8-R")
_OF_LETTERS = ("WINDOWS-1252", "ISO-8859-1")


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of text whose encoding is known.

    Attributes:
        path, name: where it is, and how the user called it.
        encoding: ``utf-8-sig``, ``utf-16`` or ``utf-32``, as Python's codecs call them: a byte order mark is read as such.
        has_cr_lines: its lines end with CR alone.
        is_compressed: by gzip or zstd.
    """

    path: Path
    name: str
    encoding: str
    has_cr_lines: bool
    is_compressed: bool

    @property
    def _is_utf_8(self) -> bool:
        return self.encoding == "utf-8-sig"

    def lines(self) -> Iterator[bytes]:
        """Lines in UTF-8; an empty one stands for blank ones, so that numbers stay those of the file.

        Raises:
            DataError: the file cannot be read to its end.
        """
        found = self._byte_lines() if self._is_utf_8 and not self.has_cr_lines else self._encoded_lines()
        return (line if line.strip() else BLANK_LINE for line in found)

    def _byte_lines(self) -> Iterator[bytes]:
        with damage_named(self.name), _open_stream(self.path) as stream:
            yield stream.readline().removeprefix(codecs.BOM_UTF8)
            yield from stream

    def _encoded_lines(self) -> Iterator[bytes]:
        with self.open_text(newline=None) as stream:
            for line in stream:
                yield line.encode(errors=self._errors)

    @contextlib.contextmanager
    def open_text(self, newline: str | None) -> Iterator[IO[str]]:
        """The decoded file; a character that is none is half of a surrogate pair, which UTF-8 cannot write.

        Args:
            newline: as that of ``open``.

        Raises:
            DataError: the file cannot be read to its end.
        """
        with damage_named(self.name), _open_stream(self.path) as stream:
            yield io.TextIOWrapper(stream, encoding=self.encoding, errors=self._errors, newline=newline)

    @property
    def _errors(self) -> str:
        return "surrogateescape" if self._is_utf_8 else "surrogatepass"

    def read(self) -> str:
        """The whole text.

        Raises:
            DataError: the file cannot be read to its end, or is not text in its encoding.
        """
        with damage_named(self.name), _open_stream(self.path) as stream:
            content = stream.read()
        try:
            return content.decode("utf-8" if self._is_utf_8 else self.encoding).removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            if not self._is_utf_8:
                raise DataError(f"{self.name}: byte {error.start + 1}: not {self.encoding} ({error.reason}). {REMEDY}") from None
            line = content[: error.start].count(b"\n") + 1
            problem = f"byte {error.start + 1} (line {line}) is 0x{content[error.start]:02x}"
            raise _not_utf_8(self.name, problem, content) from None

    def head(self, num_bytes: int) -> str:
        """So much of the beginning, as far as it is text."""
        with damage_named(self.name), _open_stream(self.path) as stream:
            return stream.read(num_bytes).decode(self.encoding, "replace")

    def count_lines(self) -> int | None:
        """Lines of the file; None where that would cost as much as reading it."""
        if self.is_compressed or self.has_cr_lines or not self._is_utf_8:
            return None
        with open(self.path, "rb") as stream:
            blocks = iter(lambda: stream.read(1 << 20), b"")
            count, last = 0, b""
            for block in blocks:
                count, last = count + block.count(b"\n"), block[-1:]
        return count + (last != b"\n")


def open_text_file(path: Path, name: str) -> TextFile:
    """Look at the beginning of a file that should be text.

    Raises:
        DataError: it is empty, something else, or in another encoding; names what it is, and the remedy.
    """
    with open(path, "rb") as stream:
        is_compressed = stream.read(4).startswith((_GZIP, _ZSTD))
    with damage_named(name), _open_stream(path) as stream:
        head = stream.read(_HEAD_BYTES)
    if not head:
        raise DataError(f"{name}: the file is empty.")
    encoding = next((encoding for mark, encoding in _BYTE_ORDER_MARKS.items() if head.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig":
        _refuse_other_kinds(head, name)
        text = head
    else:
        text = codecs.getincrementaldecoder(encoding)("replace").decode(head).encode(errors="replace")
    has_cr_lines = b"\r" in text[:-1] and b"\n" not in text
    if encoding == "utf-8-sig":
        _refuse_other_encodings(head, name, b"\r" if has_cr_lines else b"\n")
    return TextFile(path, name, encoding, has_cr_lines, is_compressed)


def _refuse_other_kinds(head: bytes, name: str) -> None:
    for other, (what, remedy) in _OTHER_STARTS.items():
        if head.startswith(other):
            raise DataError(f"{name}: the file {what}. {remedy}")
    # A character of ASCII, as text of rows starts with, has bytes of zero beside it in UTF-16 and UTF-32.
    if b"\x00" in head[:4]:
        place = (head[:4] + b"\x00").index(b"\x00")
        width = "32" if b"\x00\x00" in head[:4] else "16"
        found = f"UTF-{width}{'LE' if place else 'BE'}"
        problem = f"the file is not UTF-8 but {found}, without a byte order mark"
        raise DataError(f"{name}: {problem}. Convert it, as with\n{_conversion(found, name)}")


def _refuse_other_encodings(head: bytes, name: str, line_end: bytes) -> None:
    """Refuse a file most of whose first lines are not UTF-8; fewer are rows to be rejected."""
    lines = [line for line in head.split(line_end) if line.strip()]
    if len(head) == _HEAD_BYTES and len(lines) > 1:
        del lines[-1]  # its end is not in the head
    wrong = [line for line in lines if not _decodes(line, whole=len(lines) > 1)]
    if 2 * len(wrong) > len(lines):
        raise _not_utf_8(name, f"{len(wrong)} of its first {len(lines)} lines are in another encoding", b"\n".join(wrong))


def _decodes(line: bytes, *, whole: bool) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(line, final=whole)
    except UnicodeDecodeError:
        return False
    return True


def _not_utf_8(name: str, problem: str, sample: bytes) -> DataError:
    found = _encodings_of(sample)
    may_be = f" It may be {' or '.join(found)}: look at it, and convert it" if found else " Convert it"
    conversion = _conversion(found[0] if found else "ITS-ENCODING", name)
    return DataError(f"{name}: the file is not UTF-8: {problem}.{may_be}, as with\n{conversion}")


def _conversion(encoding: str, name: str) -> str:
    """The command that makes UTF-8 of a file, which iconv reads unpacked."""
    return f"  iconv -f {encoding} -t UTF-8 {name.removesuffix('.gz').removesuffix('.zst')} > CONVERTED"


def _encodings_of(sample: bytes) -> list[str]:
    """The encodings in which bytes may be text, for messages alone."""
    runs = re.findall(rb"[\x80-\xff]+", sample)
    alone = sum(len(run) == 1 for run in runs)
    may_be = _OF_WORDS if 10 * alone < sum(map(len, runs)) else _OF_LETTERS
    found = []
    for encoding in may_be:
        with contextlib.suppress(UnicodeDecodeError):
            sample.decode(encoding)
            found.append(encoding)
    return found[:2]


def _open_stream(path: Path) -> IO[bytes]:
    with open(path, "rb") as stream:
        start = stream.read(4)
    if start.startswith(_GZIP):
        return io.BufferedReader(gzip.open(path, "rb"))
    if start == _ZSTD:
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))
    return open(path, "rb")


@contextlib.contextmanager
def damage_named(name: str) -> Iterator[None]:
    """Turn what is raised for a file that cannot be read to its end into an error that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{name}: could not be read to its end ({error}). {REMEDY}") from None
