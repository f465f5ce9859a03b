"""Megatron-Core's ``torch_dist`` files, written and read a piece at a time, without a model and without Megatron-Core.

The files are those of ``dist_checkpointing.save`` of a GPTModel, whose entries :mod:`megatron_rmipo.checkpoint.megatron.keys`
describes, with at least one piece a layer and expert. The writer reads a tensor when its turn comes, so that nothing is held.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_rmipo.checkpoint.megatron import common_state
from megatron_rmipo.checkpoint.megatron.directory import COMMON_KEY, COMMON_NAME, read_metadata
from megatron_rmipo.checkpoint.megatron.keys import LAYERS
from megatron_rmipo.checkpoint.raw_files import open_output, read_into
from megatron_rmipo.command import progress_bar
from megatron_rmipo.errors import CheckpointError

# Files written at a time. A third of the work is torch.save's checksum, and one processor leaves a fast disk idle with it.
_NUM_THREADS = min(4, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A box of an entry, at ``offset``, of ``shape``; ``fill`` fills a tensor of that shape when it is written."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    fill: Callable[[Tensor], None]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor of the checkpoint: its key, shape over all layers, dtype and the pieces it is cut into."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


def write_torch_dist(directory: Path, entries: Sequence[Entry], objects: Sequence[str], common: dict[str, Any]) -> dict[str, str]:
    """Write a checkpoint in a folder that is there and empty.

    Args:
        directory: the folder.
        entries: every tensor; the pieces of a layer go to one file.
        objects: keys of Megatron's per-layer objects to write as None.
        common: the common state, written in the form of the installed Megatron-Core.

    Returns:
        sha256 of each file of tensors by name, taken on its way to the disk.

    Raises:
        OSError: the file system refuses.
    """
    writer = FileSystemWriter(directory)
    stored: dict[str, Any] = dict.fromkeys(objects)
    backends: dict[str, Any] = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    if common_state.is_written_as_object():
        stored[COMMON_KEY] = common
    else:
        backends |= {"common_backend": "torch", "common_backend_version": 1}
        with (directory / COMMON_NAME).open("wb") as stream:
            _save(common, stream)
    files = list(_files_of(entries).values())
    paths = [directory / f"__0_{number}.distcp" for number in range(len(files))]
    sizes = [sum(math.prod(piece.shape) * entry.dtype.itemsize for entry, piece in its) for its in files]
    written = []
    with ThreadPoolExecutor(_NUM_THREADS) as pool, progress_bar(f"writing {directory}", sum(sizes), "B", shown=True) as bar:
        for size, done in zip(sizes, pool.map(_write_file, paths, files, [stored, *([{}] * (len(files) - 1))]), strict=True):
            written.append(done)
            bar.update(size)
    described: dict[str, Any] = {entry.key: _describe(entry) for entry in entries}
    described.update({key: BytesStorageMetadata() for key in stored})
    writer.finish(Metadata(state_dict_metadata=described), [storage for storage, _ in written])
    (directory / "metadata.json").write_text(json.dumps(backends), encoding="utf-8")
    return {path.name: digest for path, (_, digest) in zip(paths, written, strict=True)}


def _files_of(entries: Sequence[Entry]) -> dict[str, list[tuple[Entry, Piece]]]:
    files: dict[str, list[tuple[Entry, Piece]]] = {}
    for entry in entries:
        for piece in entry.pieces:
            files.setdefault(_layer_of(entry.key, piece), []).append((entry, piece))
    return files


def _layer_of(key: str, piece: Piece) -> str:
    if not key.startswith(LAYERS):
        return "none"
    number = key.removeprefix(LAYERS).split(".", 1)[0]
    return number if number.isdecimal() else str(piece.offset[0])


def _write_file(path: Path, items: Sequence[tuple[Entry, Piece]], objects: Mapping[str, Any]) -> tuple[list[WriteResult], str]:
    storage: list[WriteResult] = []
    digest = hashlib.sha256()
    # One memory for all: threads that allocate and free each piece keep many of them.
    memory = bytearray(max(math.prod(piece.shape) * entry.dtype.itemsize for entry, piece in items))
    with open_output(path, digest) as stream:
        for entry, piece in items:
            offset = stream.tell()
            tensor = torch.frombuffer(memory, dtype=entry.dtype, count=math.prod(piece.shape)).view(piece.shape)
            piece.fill(tensor)
            _save(tensor, stream)
            storage.append(_stored(MetadataIndex(entry.key, torch.Size(piece.offset)), path.name, offset, stream.tell()))
        storage += _write_objects(stream, path.name, objects)
        stream.flush()
        os.fsync(stream.fileno())
    return storage, digest.hexdigest()


def _save(value: Any, stream: Any) -> None:
    try:
        torch.save(value, stream)
    except RuntimeError as error:
        # torch's archive, closed after a write that failed, complains of its own length.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(str(cause)) from error


def _write_objects(stream: Any, file_name: str, objects: Mapping[str, Any]) -> Iterator[WriteResult]:
    for key, value in objects.items():
        offset = stream.tell()
        # Megatron stores the list of a rank's objects under a key.
        data = io.BytesIO()
        torch.save([value], data)
        stream.write(data.getbuffer())
        yield _stored(MetadataIndex(key), file_name, offset, stream.tell())


def _stored(index: MetadataIndex, file_name: str, start: int, stop: int) -> WriteResult:
    return WriteResult(index=index, size_in_bytes=stop - start, storage_data=_StorageInfo(file_name, start, stop - start))


def _describe(entry: Entry) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(offsets=torch.Size(piece.offset), sizes=torch.Size(piece.shape)) for piece in entry.pieces]
    return TensorStorageMetadata(properties=TensorProperties(dtype=entry.dtype), size=torch.Size(entry.shape), chunks=chunks)


@dataclasses.dataclass(frozen=True)
class _Chunk:
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    path: Path
    start: int
    length: int


class TorchDistReader:
    """Reads parts of the tensors of a ``torch_dist`` checkpoint, written at any layout.

    Args:
        directory: the checkpoint.

    Raises:
        CheckpointError: its metadata is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        metadata = read_metadata(self.directory)
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: item for key, item in metadata.state_dict_metadata.items() if isinstance(item, TensorStorageMetadata)
        }
        self._chunks: dict[str, list[_Chunk]] = {key: [] for key in self.tensors}
        sizes = {key: {tuple(c.offsets): tuple(c.sizes) for c in item.chunks} for key, item in self.tensors.items()}
        for index, info in metadata.storage_data.items():
            if index.fqn in self.tensors:
                offset = tuple(index.offset)
                path = self.directory / info.relative_path
                self._chunks[index.fqn].append(_Chunk(offset, sizes[index.fqn][offset], path, info.offset, info.length))
        self._chunks_by_index: dict[tuple[str, int], dict[tuple[int, ...], list[_Chunk]]] = {}
        self._data_positions: dict[_Chunk, int] = {}

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a tensor."""
        dtype: torch.dtype = self.tensors[key].properties.dtype
        return dtype

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, over all layers and ranks."""
        return tuple(self.tensors[key].size)

    def read_rows(self, key: str, index: tuple[int, ...], start: int, stop: int) -> Tensor:
        """Rows ``[start, stop)`` of a tensor, or of one layer or expert in an entry of all; only they are read.

        Args:
            key: the entry.
            index: place along the dimensions before its rows.
            start: first row.
            stop: row after the last.

        Raises:
            CheckpointError: a file is damaged, or its pieces leave a gap.
        """
        shape = self.shape(key)
        columns = shape[len(index) + 1 :]
        rows = torch.empty((stop - start, *columns), dtype=self.dtype(key))
        filled = 0
        for chunk in self._chunks_of(key, index):
            offset, extent = chunk.offset[len(index) :], chunk.shape[len(index) :]
            # The rows of what stands before it in the piece.
            skipped = 0
            for at, first, size in zip(index, chunk.offset, chunk.shape, strict=False):
                skipped = skipped * size + at - first
            skipped *= extent[0]
            low, high = max(start, offset[0]), min(stop, offset[0] + extent[0])
            if low >= high:
                continue
            where = (slice(low - start, high - start), *(slice(o, o + n) for o, n in zip(offset[1:], extent[1:], strict=True)))
            target = rows[where]
            part = target if target.is_contiguous() else torch.empty(target.shape, dtype=rows.dtype)
            self._read_chunk_rows(key, chunk, skipped + low - offset[0], part)
            if part is not target:
                target.copy_(part)
            filled += part.numel()
        if filled != rows.numel():
            raise CheckpointError(
                f"{self.directory}: the pieces of {key} hold {filled} of {rows.numel()} values of its rows {start} to {stop}."
            )
        return rows

    def _chunks_of(self, key: str, index: tuple[int, ...]) -> list[_Chunk]:
        depth = len(index)
        if (key, depth) not in self._chunks_by_index:
            # Looked through once: a large model has thousands of pieces, each of which is asked for by itself.
            found = self._chunks_by_index.setdefault((key, depth), {})
            for chunk in self._chunks[key]:
                ranges = (
                    range(first, first + size) for first, size in zip(chunk.offset[:depth], chunk.shape[:depth], strict=True)
                )
                for held in itertools.product(*ranges):
                    found.setdefault(held, []).append(chunk)
        return self._chunks_by_index[key, depth].get(index, [])

    def _read_chunk_rows(self, key: str, chunk: _Chunk, first: int, rows: Tensor) -> None:
        """Fill ``rows`` from row ``first`` of a piece seen as a stack of rows (layers and experts run on)."""
        row_bytes = math.prod(rows.shape[1:]) * rows.dtype.itemsize
        try:
            if chunk not in self._data_positions:
                self._data_positions[chunk] = _tensor_data_position(chunk, math.prod(chunk.shape) * rows.dtype.itemsize)
            read_into(rows, chunk.path, self._data_positions[chunk] + first * row_bytes)
        except (OSError, zipfile.BadZipFile, StopIteration) as error:
            raise CheckpointError(f"{chunk.path} cannot be read where {key} lies: {error!r}.") from error


def check_archives(directory: Path) -> None:
    """Check that each piece of a checkpoint, and its common state, can be read and has the checksums torch wrote with it.

    Raises:
        CheckpointError: naming the file and what lies there; also where one names what no checkpoint may hold.
    """
    for index, info in read_metadata(directory).storage_data.items():
        _check_archive(directory / info.relative_path, info.offset, info.length, index.fqn)
    common = directory / COMMON_NAME
    if common.exists():
        _check_archive(common, 0, common.stat().st_size, "the common state")
    common_state.read_common(directory)


def _check_archive(path: Path, start: int, length: int, name: str) -> None:
    try:
        with path.open("rb") as stream, zipfile.ZipFile(_Window(stream, start, length)) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path} cannot be read where {name} lies: {error!r}.") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged where {name} lies: {damaged} does not have its checksum.")


class _Window(io.RawIOBase):
    """A part of a file, seen as a file."""

    def __init__(self, stream: Any, start: int, length: int) -> None:
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        self._stream.seek(self._start + self._at)
        data: bytes = self._stream.read(left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data


def _tensor_data_position(chunk: _Chunk, num_bytes: int) -> int:
    """Where the bytes of a tensor begin in the file: torch.save keeps them uncompressed in a zip archive."""
    with chunk.path.open("rb") as stream:
        with zipfile.ZipFile(_Window(stream, chunk.start, chunk.length)) as archive:
            member = next(item for item in archive.infolist() if item.filename.endswith("/data/0"))
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != num_bytes:
            raise zipfile.BadZipFile(f"{member.file_size} bytes instead of {num_bytes}")
        stream.seek(chunk.start + member.header_offset)
        header = stream.read(30)
    name_length, extra_length = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return int(chunk.start + member.header_offset + 30 + name_length + extra_length)
