"""Safetensors files of a Hugging Face directory, read by slices and written as a stream.

A file's header is checked against its length before anything is read: a truncated download is then an error that names the file.
Whole rows are read straight into memory that is there; columns go through ``safetensors.safe_open``, which touches no others.
Writing puts the header first, so that no more than the piece at hand is ever in memory.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_rmipo.checkpoint.raw_files import bytes_of, open_output, read_into
from megatron_rmipo.errors import ConversionError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Tensors are read and written in pieces of about this size. The allocator keeps several, so larger ones cost more than they gain.
PIECE_BYTES = 4 * 2**20

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies (``position``, in bytes from the start of its file) and what it is.

    The file has no name for one that is a part of another.
    """

    path: Path
    position: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_part: bool = False


class WeightFiles:
    """The weights of a Hugging Face directory, one file or many with an index.

    Args:
        directory: holds ``model.safetensors``, or ``model.safetensors.index.json`` and the files it names.

    Raises:
        ConversionError: no weights, a file the index names is missing or truncated, or index and files disagree.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.tensors: dict[str, StoredTensor] = {}
        weight_map = _read_index(self.directory)
        for path in _weight_paths(self.directory, weight_map):
            for name, stored in _read_header(path).items():
                if weight_map is None or weight_map.get(name) == path.name:
                    self.tensors[name] = stored
        if weight_map is not None and (lost := sorted(set(weight_map) - set(self.tensors))):
            raise ConversionError(
                f"{self.directory / INDEX_NAME}: {len(lost)} tensors are not in the files it names for them, "
                f"the first is {lost[0]} in {weight_map[lost[0]]}. Download the checkpoint again."
            )

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def expect(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """The stored tensor of that name, checked to have ``shape``."""
        stored = self.tensors[name]
        if stored.shape != shape:
            raise ConversionError(
                f"{stored.path}: {name} has shape {list(stored.shape)}, but config.json makes it {list(shape)}."
            )
        return stored

    def split(self, joined: str, parts: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        """Take the parts of a tensor, by name and shape, which fill it one after another, for tensors in its place."""
        stored = self.tensors.pop(joined)
        position = stored.position
        for name, shape in parts:
            self.tensors[name] = StoredTensor(stored.path, position, shape, stored.dtype, is_part=True)
            position += math.prod(shape) * stored.dtype.itemsize
        assert position - stored.position == math.prod(stored.shape) * stored.dtype.itemsize

    def read(self, name: str, start: int, rows: Tensor, columns: slice = slice(None)) -> None:
        """Fill ``rows`` with those of a tensor from row ``start`` on, of a matrix with the selected columns alone.

        Args:
            name: the tensor.
            start: first row.
            rows: of any dtype and device.
            columns: of a matrix.

        Raises:
            ConversionError: the file cannot be read.
        """
        stored = self.tensors[name]
        whole = rows.shape[1:] == stored.shape[1:]
        direct = whole and rows.is_cpu and rows.dtype == stored.dtype and rows.is_contiguous()
        try:
            if whole or stored.is_part:
                data = rows if direct else torch.empty((rows.shape[0], *stored.shape[1:]), dtype=stored.dtype)
                row_bytes = math.prod(stored.shape[1:]) * stored.dtype.itemsize
                read_into(data, stored.path, stored.position + start * row_bytes)
                data = data if whole else data[:, columns]
            else:
                with safe_open(stored.path, framework="pt", device="cpu") as file:
                    data = file.get_slice(name)[start : start + rows.shape[0], columns]
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{stored.path} cannot be read: {error}") from error
        if not direct:
            rows.copy_(data)

    def read_lines(self, name: str, start: int, lines: Tensor) -> None:
        """Fill ``lines [L, D]``, on the CPU and of the tensor's dtype, with those from ``start`` on of a tensor ``[..., D]``.

        Raises:
            ConversionError: the file cannot be read.
        """
        stored = self.tensors[name]
        try:
            read_into(lines, stored.path, stored.position + start * stored.shape[-1] * stored.dtype.itemsize)
        except OSError as error:
            raise ConversionError(f"{stored.path} cannot be read: {error}") from error


def row_pieces(shape: Sequence[int], dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
    """Runs of rows ``[start, stop)`` of a tensor, each of at most about :data:`PIECE_BYTES`."""
    stop = shape[0] if stop is None else stop
    row_bytes = max(1, math.prod(shape[1:]) * dtype.itemsize)
    step = max(1, PIECE_BYTES // row_bytes)
    for low in range(start, stop, step):
        yield low, min(low + step, stop)


@dataclasses.dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


class ShardedWriter:
    """Writes safetensors files of bounded size, tensors in the order planned, and the index that names them.

    Args:
        directory: exists, and is empty or holds other files.
        plan: every tensor, in the order they will be written.
        max_shard_bytes: a file is closed before a tensor that would take it beyond.
    """

    def __init__(self, directory: Path, plan: Sequence[TensorPlan], max_shard_bytes: float) -> None:
        self._directory = directory
        self._shards = _cut_into_shards(plan, max_shard_bytes)
        self._shard_of = {tensor.name: i for i, shard in enumerate(self._shards) for tensor in shard}
        self._plan = plan
        self._written: dict[str, str] = {}
        self._missing_bytes = 0
        self._stream: Any = None

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Write the next tensor, or more of one that was begun, given as pieces along its rows.

        Each piece is converted to the planned dtype.

        Raises:
            OSError: the file system refuses.
        """
        if not self._missing_bytes:
            self._begin_tensor(name)
        planned = self._plan[len(self._written) - 1]
        assert planned.name == name, (planned.name, name)
        for piece in pieces:
            data = piece.detach().to(device="cpu", dtype=planned.dtype).contiguous()
            self._stream.write(bytes_of(data))
            self._missing_bytes -= data.numel() * data.element_size()
        assert self._missing_bytes >= 0, (name, self._missing_bytes)

    def finish(self) -> None:
        """Write the index, where there is more than one file, and flush everything to the disk."""
        assert len(self._written) == len(self._plan), "tensors were planned and not written"
        assert not self._missing_bytes, "the last tensor is not whole"
        self._end()
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": sum(tensor.num_bytes for tensor in self._plan)},
                "weight_map": dict(sorted(self._written.items())),
            }
            (self._directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Close the file at hand, whole or not."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _file_name(self, shard: int) -> str:
        count = len(self._shards)
        return SINGLE_NAME if count == 1 else f"model-{shard + 1:05d}-of-{count:05d}.safetensors"

    def _begin_tensor(self, name: str) -> None:
        planned, shard = self._plan[len(self._written)], self._shard_of[name]
        assert planned.name == name, (planned.name, name)
        if planned is self._shards[shard][0]:
            self._begin(shard)
        self._written[name], self._missing_bytes = self._file_name(shard), planned.num_bytes

    def _begin(self, shard: int) -> None:
        self._end()
        self._stream = open_output(self._directory / self._file_name(shard))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in self._shards[shard]:
            header[tensor.name] = {
                "dtype": _DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.num_bytes],
            }
            offset += tensor.num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._stream.write(len(text).to_bytes(8, "little") + text)

    def _end(self) -> None:
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self.close()


def _cut_into_shards(plan: Sequence[TensorPlan], max_shard_bytes: float) -> list[list[TensorPlan]]:
    shards: list[list[TensorPlan]] = [[]]
    size = 0
    for tensor in plan:
        if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def _read_index(directory: Path) -> dict[str, str] | None:
    path = directory / INDEX_NAME
    if not path.exists():
        return None
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{path} is not an index of safetensors files ({error!r}). Download it again.") from error


def _weight_paths(directory: Path, weight_map: dict[str, str] | None) -> list[Path]:
    if weight_map is None:
        path = directory / SINGLE_NAME
        if path.exists():
            return [path]
        others = sorted(item.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for item in directory.glob(pattern))
        found = f" It holds {', '.join(others[:3])}: save the model as safetensors first." if others else " Download them."
        raise ConversionError(f"{directory} has neither {SINGLE_NAME} nor {INDEX_NAME}.{found}")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise ConversionError(
            f"{directory / INDEX_NAME} names {len(names)} files, of which {len(missing)} are missing: "
            f"{', '.join(missing[:4])}. Download them again."
        )
    return [directory / name for name in names]


def _read_header(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if size < 8 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
            raise ConversionError(
                f"{path} is {size} bytes, too short for the header it announces: truncated, or not a safetensors file "
                "(a Git LFS pointer?). Download it again."
            )
        try:
            header = json.loads(stream.read(header_bytes))
            header.pop("__metadata__", None)
            entries = {name: _parse_entry(entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ConversionError(f"{path} has a damaged header ({error!r}). Download it again.") from error
    data_position = 8 + header_bytes
    needed = data_position + max((end for _, _, _, end in entries.values()), default=0)
    if size < needed:
        raise ConversionError(f"{path} is {size} bytes, but its header says {needed}: truncated. Download it again.")
    tensors = {}
    for name, (dtype, shape, begin, end) in entries.items():
        if dtype not in _DTYPES:
            raise ConversionError(
                f"{path}: {name} is stored as {dtype}; supported are {', '.join(_DTYPES)}. Quantized weights must be dequantized "
                "and saved again, with transformers, before."
            )
        if begin < 0 or end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
            raise ConversionError(
                f"{path} has a damaged header: {name}, {dtype} {list(shape)}, is not what bytes {begin} to {end} hold. "
                "Download it again."
            )
        tensors[name] = StoredTensor(path, data_position + begin, shape, _DTYPES[dtype])
    return tensors


def _parse_entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    begin, end = entry["data_offsets"]
    return str(entry["dtype"]), tuple(map(int, entry["shape"])), int(begin), int(end)
