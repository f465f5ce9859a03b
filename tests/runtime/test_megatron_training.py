"""Megatron-LM's program without CUDA: with CUDA nothing is touched."""

from __future__ import annotations

import sys

import pytest
import torch

from megatron_rmipo.runtime import megatron_training


def test_nothing_is_touched_where_there_is_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loaded = set(sys.modules)
    assert not megatron_training.install_cpu_training()
    assert not {name for name in set(sys.modules) - loaded if name.startswith("megatron.training")}
    assert not megatron_training._installed
