"""Reading and writing of raw tensor data, against Python's own files and safetensors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_rmipo.checkpoint import raw_files
from megatron_rmipo.checkpoint.hf.safetensors_files import WeightFiles
from megatron_rmipo.checkpoint.raw_files import bytes_of, open_output, read_into
from megatron_rmipo.errors import ConversionError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_tensor_lie_where_they_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randn(7, 5, generator=torch.Generator().manual_seed(3)).to(dtype)
    (tmp_path / "file").write_bytes(b"odd" + bytes_of(tensor) + b"rest")
    around = torch.zeros(9, 5, dtype=dtype)
    read_into(around[1:8], tmp_path / "file", 3)
    assert torch.equal(around[1:8], tensor)
    assert not around[0].any()
    assert not around[8].any()
    with pytest.raises(OSError, match="truncated"):
        read_into(around, tmp_path / "file", 3)


def test_what_is_written_is_whole_and_flushed_from_early_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_files, "_WRITE_BYTES", 8192)
    monkeypatch.setattr(raw_files, "_FLUSH_BYTES", 32768)
    flushed = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: flushed.append(arguments[1:]), raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    data = torch.randint(256, (100003,), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    with open_output(tmp_path / "file") as stream:
        stream.write(b"header")
        stream.write(bytes_of(data))
        stream.write(b"end")
    assert (tmp_path / "file").read_bytes() == b"header" + data.numpy().tobytes() + b"end"
    # Every whole run of 32,768 bytes as soon as it was there, each once; the file ends behind the third.
    assert flushed == [(0, 32768, 4), (32768, 32768, 4), (65536, 32768, 4)]


@pytest.fixture
def weights(tmp_path: Path) -> tuple[WeightFiles, torch.Tensor]:
    stored = torch.randn(41, 23, generator=torch.Generator().manual_seed(3))
    save_file({"before": torch.ones(3), "matrix": stored}, tmp_path / "model.safetensors")
    return WeightFiles(tmp_path), stored


@pytest.mark.parametrize("columns", [slice(None), slice(11, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_columns_are_read(weights: tuple[WeightFiles, torch.Tensor], columns: slice, dtype: torch.dtype) -> None:
    files, stored = weights
    expected = stored[7:31, columns].to(dtype)
    around = torch.zeros(26, expected.shape[1], dtype=dtype)
    files.read("matrix", 7, around[1:25], columns)
    assert torch.equal(around[1:25], expected)
    assert not around[0].any()
    assert not around[25].any()
    # Into memory that has gaps, too.
    apart = torch.zeros(24, 2 * expected.shape[1], dtype=dtype)
    files.read("matrix", 7, apart[:, ::2], columns)
    assert torch.equal(apart[:, ::2], expected)
    assert not apart[:, 1::2].any()


@pytest.mark.parametrize("columns", [slice(None), slice(11, 20)])
def test_file_that_shrinks_after_it_was_opened_is_named(weights: tuple[WeightFiles, torch.Tensor], columns: slice) -> None:
    files, stored = weights
    path = files.tensors["matrix"].path
    os.truncate(path, path.stat().st_size - 400)
    with pytest.raises(ConversionError, match=r"model\.safetensors cannot be read"):
        files.read("matrix", 0, torch.empty_like(stored[:, columns]), columns)
