"""Tensors that are parts of others, read by rows and by columns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_rmipo.checkpoint.hf.safetensors_files import WeightFiles


@pytest.mark.parametrize("columns", [slice(None), slice(2, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_a_tensor_are_read_as_tensors(tmp_path: Path, columns: slice, dtype: torch.dtype) -> None:
    joined = torch.randn((3, 11, 7), generator=torch.Generator().manual_seed(1))
    save_file({"before": torch.ones(5), "joined": joined}, tmp_path / "model.safetensors")
    files = WeightFiles(tmp_path)
    files.split("joined", [(f"{name}{i}", (rows, 7)) for i in range(3) for name, rows in (("a", 4), ("b", 7))])
    assert "joined" not in files
    for i in range(3):
        for name, whole in ((f"a{i}", joined[i, :4]), (f"b{i}", joined[i, 4:])):
            expected = whole[1:3, columns].to(dtype)
            rows = torch.empty_like(expected)
            files.read(name, 1, rows, columns)
            assert torch.equal(rows, expected)
