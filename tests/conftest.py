"""What the markers of pyproject.toml mean, and which tests see a GPU."""

import os
import re

import pytest
import torch


def asks_for_gpu(marker_expression: str) -> bool:
    """Whether ``-m`` names the tests that need a GPU."""
    return re.search(r"(?<!not )\bgpu\b", marker_expression) is not None


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all tests but those asked for by ``-m gpu``.

    The others start ranks, each of which would want a device of its own: with one GPU, or none, they are tests of the CPU.
    """
    if not asks_for_gpu(config.getoption("markexpr")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where no GPU is seen."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and -m gpu"))
