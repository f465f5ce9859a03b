"""Safetensors files of a Hugging Face directory, written as streams: which there are, and each by whoever holds its tensors.

The header goes first, so that no more than the piece at hand is ever in memory.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rmipo.checkpoint.hf.safetensors_files import DTYPES, INDEX_NAME, SINGLE_NAME
from megatron_rmipo.checkpoint.raw_files import bytes_of, open_output

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written; ``stage`` is the pipeline stage that holds it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stage: int = 0

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class FilePlan:
    """A file to be written: its name, and its tensors in their order, all of one stage."""

    name: str
    tensors: tuple[TensorPlan, ...]

    @property
    def stage(self) -> int:
        """The pipeline stage that holds its tensors."""
        return self.tensors[0].stage

    @property
    def header(self) -> bytes:
        """What it begins with."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in self.tensors:
            header[tensor.name] = {
                "dtype": _DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.num_bytes],
            }
            offset += tensor.num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def num_bytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + sum(tensor.num_bytes for tensor in self.tensors)


def plan_files(tensors: Sequence[TensorPlan], max_shard_bytes: float) -> list[FilePlan]:
    """The files of a directory. One ends before a tensor that would take it beyond a size, and where another stage begins.

    Args:
        tensors: all, in the order they are written in.
        max_shard_bytes: the size.
    """
    files: list[list[TensorPlan]] = [[]]
    size = 0
    for tensor in tensors:
        if files[-1] and (size + tensor.num_bytes > max_shard_bytes or tensor.stage != files[-1][0].stage):
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.num_bytes
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    return [FilePlan(name, tuple(held)) for name, held in zip(names if len(files) > 1 else [SINGLE_NAME], files, strict=True)]


def write_index(directory: Path, files: Sequence[FilePlan]) -> None:
    """Write the index that says which file holds a tensor, where there is more than one.

    Raises:
        OSError: the file system refuses.
    """
    if len(files) == 1:
        return
    tensors = [tensor for file in files for tensor in file.tensors]
    index = {
        "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors)},
        "weight_map": dict(sorted((tensor.name, file.name) for file in files for tensor in file.tensors)),
    }
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class FileWriter:
    """Writes one file, its tensors in the order planned. A context manager, which closes the file, whole or not.

    Args:
        directory: exists.
        plan: the file.

    Raises:
        OSError: the file system refuses.
    """

    def __init__(self, directory: Path, plan: FilePlan) -> None:
        self._plan, self._num_begun, self._missing_bytes = plan, 0, 0
        self._stream = open_output(directory / plan.name)
        self._stream.write(plan.header)

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, name: str, pieces: Iterable[Tensor]) -> int:
        """Write the next tensor, or more of one that was begun, given as pieces along its rows.

        Each piece is converted to the planned dtype.

        Returns:
            How many bytes these were.

        Raises:
            OSError: the file system refuses.
        """
        if not self._missing_bytes:
            self._missing_bytes = self._plan.tensors[self._num_begun].num_bytes
            self._num_begun += 1
        planned, num_bytes = self._plan.tensors[self._num_begun - 1], 0
        assert planned.name == name, (planned.name, name)
        for piece in pieces:
            data = piece.detach().to(device="cpu", dtype=planned.dtype).contiguous()
            self._stream.write(bytes_of(data))
            num_bytes += data.numel() * data.element_size()
        self._missing_bytes -= num_bytes
        assert self._missing_bytes >= 0, (name, self._missing_bytes)
        return num_bytes

    def finish(self) -> None:
        """Flush the file, which is whole, to the disk.

        Raises:
            OSError: the file system refuses.
        """
        assert self._num_begun == len(self._plan.tensors), "tensors were planned and not written"
        assert not self._missing_bytes, "the last tensor is not whole"
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file, whole or not."""
        self._stream.close()
