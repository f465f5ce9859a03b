"""Files of raw tensor data: read straight into tensors that are there, written so that the disk is busy meanwhile."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# For larger writes Linux looks for larger pages to cache them in, which can take longer than to fill them.
_WRITE_BYTES = 512 * 2**10
_FLUSH_BYTES = 8 * 2**20


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any dtype."""
    assert tensor.is_contiguous()
    return tensor.flatten().view(torch.uint8).numpy().data


def read_into(tensor: Tensor, path: Path, position: int) -> None:
    """Fill a contiguous CPU tensor with the bytes at ``position`` of a file.

    Raises:
        OSError: the file cannot be read, or ends too early.
    """
    target = bytes_of(tensor)
    with path.open("rb") as stream:
        stream.seek(position)
        if stream.readinto(target) != len(target):
            raise OSError(f"truncated: less than {position + len(target)} bytes")


class _OutputFile(io.FileIO):
    """A file that takes a bounded number of bytes at a time, up to an even position, and starts to flush them."""

    def __init__(self, path: Path, digest: Any | None) -> None:
        super().__init__(path, "wb")
        self._digest = digest

    def write(self, data: Any, /) -> int:
        position = self.tell()
        piece = memoryview(data)[: _WRITE_BYTES - position % _WRITE_BYTES]
        written = super().write(piece)
        if self._digest is not None:
            self._digest.update(piece[:written])
        end = position + written
        if end % _FLUSH_BYTES == 0 and hasattr(os, "posix_fadvise"):
            # Of pages that are not on the disk yet, this one only starts the writing, which fsync would otherwise begin with.
            os.posix_fadvise(self.fileno(), end - _FLUSH_BYTES, _FLUSH_BYTES, os.POSIX_FADV_DONTNEED)
        return written


def open_output(path: Path, digest: Any | None = None) -> io.BufferedWriter:
    """Open a new file that is to hold much. The caller flushes and fsyncs it.

    Args:
        path: the file.
        digest: an object of :mod:`hashlib` that is fed what goes to the disk.
    """
    return io.BufferedWriter(_OutputFile(path, digest))


def file_digest(path: Path) -> str:
    """sha256 of a file's contents, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
