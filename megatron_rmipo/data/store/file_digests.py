"""Digests of a data set's files: taken while they are written, kept, and computed where none can be trusted."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rmipo.command import progress_bar
from megatron_rmipo.data.store.manifest import FileDigest

# What stands in the directory of log-probs: sizes, times and digests of files that were read for it.
KEPT_NAME = "data-digests.json"
# Smaller files are read again sooner than they are looked up.
_LARGE_BYTES = 1 << 30
_PIECE_BYTES = 16 << 20
# A MiB in all; smaller data are read whole.
_SAMPLES = 256
_SAMPLE_BYTES = 4096


class HashedStream:
    """A binary file that is open for writing and is hashed on its way to the disk.

    Args:
        stream: the file, of which nothing is written yet.
    """

    def __init__(self, stream: Any) -> None:
        self._stream, self._sha256, self._num_bytes = stream, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """Write bytes, all of them."""
        self._sha256.update(data)
        self._num_bytes += len(data)
        return int(self._stream.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def digest_of(self, path: Path) -> FileDigest | None:
        """The digest of the file, which is closed and lies at ``path``; None where it was not written from end to end."""
        if path.stat().st_size != self._num_bytes:
            return None
        return FileDigest(self._sha256.hexdigest(), sample_digest(path, _SAMPLES))


def digest_of(path: Path) -> FileDigest:
    """The digest of a file, which is read for it.

    Raises:
        OSError: it cannot be read.
    """
    return FileDigest(_compute(path, path.stat().st_size), sample_digest(path, _SAMPLES))


def sha256_of(path: Path, manifest_path: Path, written: FileDigest | None, kept_in: Path) -> str:
    """sha256 of a file of a data set, in hex, without reading all of a large one where it is known.

    That of the manifest counts if the file was not changed after the manifest was written, and if samples of it are those that
    were written: a manifest beside files of another run is not believed. Else what was computed before counts, of a file of the
    same name, size and time of change; else it is computed, which shows a progress bar, and kept.

    Args:
        path: the file.
        manifest_path: of the data set.
        written: what the manifest says of the file, if anything.
        kept_in: a directory of the data set or of the user's choice, in which what was computed is kept if it can be written.

    Raises:
        OSError: the file cannot be read.
    """
    status = path.stat()
    is_older = status.st_mtime_ns <= manifest_path.stat().st_mtime_ns
    if written is not None and is_older and sample_digest(path, _SAMPLES) == written.sample:
        return written.sha256
    if status.st_size < _LARGE_BYTES:
        return _compute(path, status.st_size)
    kept = _Kept(str(path.resolve()), status.st_size, status.st_mtime_ns)
    known = _read_kept(kept_in)
    if kept not in known:
        known[kept] = _compute(path, status.st_size)
        # What cannot be kept is computed again.
        with contextlib.suppress(OSError):
            _write_kept(kept_in, known)
    return known[kept]


def sample_digest(path: Path, num_samples: int) -> str:
    """Hex digest over a file's size and ``num_samples`` pieces of it, evenly spaced, first and last among them."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as stream:
        for start in np.unique(np.linspace(0, max(0, size - _SAMPLE_BYTES), num_samples, dtype=np.int64)).tolist():
            stream.seek(start)
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class _Kept:
    """What a digest that was computed is known by."""

    path: str
    size: int
    mtime_ns: int


def _compute(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    with progress_bar(f"hashing {path}", size, "B", shown=size >= _LARGE_BYTES) as bar, open(path, "rb") as stream:
        for piece in _pieces(stream):
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()


def _pieces(stream: Any) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(_PIECE_BYTES))
    while size := stream.readinto(buffer):
        yield buffer[:size]


def _read_kept(directory: Path) -> dict[_Kept, str]:
    try:
        entries = json.loads((directory / KEPT_NAME).read_text(encoding="utf-8"))
        return {_Kept(str(path), int(size), int(mtime)): str(digest) for path, size, mtime, digest in entries}
    except (OSError, ValueError, TypeError):
        # It only saves time.
        return {}


def _write_kept(directory: Path, known: dict[_Kept, str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps([[*dataclasses.astuple(kept), digest] for kept, digest in known.items()], indent=2) + "\n"
    descriptor, temporary = tempfile.mkstemp(prefix=".", dir=directory)
    try:
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, directory / KEPT_NAME)
    except OSError:
        os.unlink(temporary)
        raise
