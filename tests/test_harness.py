"""Which tests see a GPU, and that ranks forked from the server that has everything loaded can use one."""

from __future__ import annotations

import os

import pytest
import torch

from tests.conftest import asks_for_gpu
from tests.harness import run_distributed


@pytest.mark.parametrize(
    ("expression", "asks"),
    [
        ("gpu", True),
        ("gpu and not slow", True),
        ("", False),
        ("not gpu", False),
        ("not slow and not dist", False),
        ("dist and not gpu", False),
    ],
)
def test_only_gpu_asks_for_a_gpu(expression: str, asks: bool) -> None:
    assert asks_for_gpu(expression) == asks


def test_a_gpu_is_hidden_from_all_other_tests() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not torch.cuda.is_available()


def what_a_rank_sees() -> tuple[str | None, str | None, bool]:
    # A process that was forked after CUDA was started is marked, and torch refuses to start it there.
    names = ("CUDA_VISIBLE_DEVICES", "PYTORCH_NVML_BASED_CUDA_CHECK")
    return os.environ.get(names[0]), os.environ.get(names[1]), torch.cuda._is_in_bad_fork()


@pytest.mark.dist
def test_ranks_see_what_the_tests_see_and_could_start_cuda() -> None:
    assert run_distributed(what_a_rank_sees, 1) == [("", "1", False)]


@pytest.mark.gpu
def test_ranks_can_use_cuda() -> None:
    assert run_distributed(sum_on_gpu, 1) == [3.0]


def sum_on_gpu() -> float:
    return float(torch.ones(3, device="cuda").sum())
