"""Safetensors files of a Hugging Face directory, read by slices.

A file's header is checked against its length before anything is read: a truncated download is then an error that names the file.
Whole rows are read straight into memory that is there; columns go through ``safetensors.safe_open``, which touches no others.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_rmipo.checkpoint.peft.factors import LowRankFactors
from megatron_rmipo.checkpoint.raw_files import read_into
from megatron_rmipo.errors import ConversionError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Tensors are read and written in pieces of about this size. The allocator keeps several, so larger ones cost more than they gain.
PIECE_BYTES = 4 * 2**20

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
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


class Change(NamedTuple):
    """What an adapter adds to a stored tensor: to the rows from ``first`` on of the weight that its factors are of."""

    factors: LowRankFactors
    first: int


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
        self._changes: dict[str, Change] = {}
        self._replaced: dict[str, StoredTensor] = {}
        weight_map = _read_index(self.directory)
        for path in _weight_paths(self.directory, weight_map):
            for name, stored in read_header(path).items():
                if weight_map is None or weight_map.get(name) == path.name:
                    self.tensors[name] = stored
        if weight_map is not None and (lost := sorted(set(weight_map) - set(self.tensors))):
            raise ConversionError(
                f"{self.directory / INDEX_NAME}: {len(lost)} tensors are not in the files it names for them, "
                f"the first is {lost[0]} in {weight_map[lost[0]]}. Download the checkpoint again."
            )

    def change(self, name: str, factors: LowRankFactors, first: int) -> None:
        """Read a matrix, or the matrices of all experts ``[E, C, R]``, from now on as an adapter makes it.

        Numbers are those of PEFT's merge of a model that was loaded in the wider dtype of the file's and of what is read into.

        Args:
            name: the tensor.
            factors: the adapter, of a weight, or of all experts, of which the tensor holds all rows or some.
            first: which of the weight's rows the tensor begins with.
        """
        self._changes[name] = Change(factors, first)

    def replace(self, name: str, stored: StoredTensor) -> None:
        """Read another tensor of the same shape, of whatever dtype, in the place of one; its dtype counts as the former's."""
        assert stored.shape == self.tensors[name].shape
        self._replaced[name] = stored

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
        change = self._changes.get(name)
        if change is None:
            self._read_stored(name, start, rows, columns)
            return
        # Lengths are given to whole rows.
        is_wide = change.factors.magnitude is not None
        shape = (rows.shape[0], self.tensors[name].shape[1]) if is_wide else rows.shape
        weight = torch.empty(shape, dtype=self._dtype_of_sum(name, rows))
        self._read_stored(name, start, weight, slice(None) if is_wide else columns)
        merged = change.factors.merge(weight, change.first + start, slice(None) if is_wide else columns)
        rows.copy_(merged[:, columns] if is_wide else merged)

    def _dtype_of_sum(self, name: str, target: Tensor) -> torch.dtype:
        return torch.promote_types(self.tensors[name].dtype, target.dtype)

    def _read_stored(self, name: str, start: int, rows: Tensor, columns: slice) -> None:
        stored = self._replaced.get(name, self.tensors[name])
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
        """Fill ``lines [L, D]``, on the CPU, of any dtype, with those from ``start`` on of a tensor ``[..., D]``.

        Of the matrices of all experts they are one expert's.

        Raises:
            ConversionError: the file cannot be read.
        """
        stored, change = self._replaced.get(name, self.tensors[name]), self._changes.get(name)
        data = lines if lines.dtype == stored.dtype else torch.empty(lines.shape, dtype=stored.dtype)
        try:
            read_into(data, stored.path, stored.position + start * stored.shape[-1] * stored.dtype.itemsize)
        except OSError as error:
            raise ConversionError(f"{stored.path} cannot be read: {error}") from error
        if change is not None:
            expert, first = divmod(start, stored.shape[1])
            columns = slice(first, first + lines.shape[0])
            data = change.factors.of_expert(expert).merge(data.to(self._dtype_of_sum(name, lines)).T, 0, columns).T
        if data is not lines:
            lines.copy_(data)


def row_pieces(shape: Sequence[int], dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
    """Runs of rows ``[start, stop)`` of a tensor, each of at most about :data:`PIECE_BYTES`."""
    stop = shape[0] if stop is None else stop
    row_bytes = max(1, math.prod(shape[1:]) * dtype.itemsize)
    step = max(1, PIECE_BYTES // row_bytes)
    for low in range(start, stop, step):
        yield low, min(low + step, stop)


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


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name.

    Raises:
        ConversionError: it is none, or is truncated, or a tensor has a dtype that is not read.
    """
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
        if dtype not in DTYPES:
            raise ConversionError(
                f"{path}: {name} is stored as {dtype}; supported are {', '.join(DTYPES)}. Quantized weights must be dequantized "
                "and saved again, with transformers, before."
            )
        if begin < 0 or end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ConversionError(
                f"{path} has a damaged header: {name}, {dtype} {list(shape)}, is not what bytes {begin} to {end} hold. "
                "Download it again."
            )
        tensors[name] = StoredTensor(path, data_position + begin, shape, DTYPES[dtype])
    return tensors


def _parse_entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    begin, end = entry["data_offsets"]
    return str(entry["dtype"]), tuple(map(int, entry["shape"])), int(begin), int(end)
