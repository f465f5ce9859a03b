"""The CPU shims: in place without CUDA, and nothing touched where CUDA is present."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_rmipo.runtime.cpu import install_cpu_runtime

SNAPSHOT = """
import torch
names = ["current_device", "synchronize", "Stream", "Event", "stream", "device"]
names += ["get_rng_state", "manual_seed", "default_generators", "_lazy_call"]
before = [getattr(torch.cuda, name, None) for name in names] + [torch.Tensor.cuda, torch.nn.Module.cuda]
torch.cuda.is_available = lambda: True
from megatron_rmipo.runtime.cpu import install_cpu_runtime
assert install_cpu_runtime() is False
after = [getattr(torch.cuda, name, None) for name in names] + [torch.Tensor.cuda, torch.nn.Module.cuda]
assert all(one is other for one, other in zip(before, after)), "something was patched"
assert torch.overrides._get_current_function_mode() is None
"""


def test_nothing_is_touched_where_cuda_is_present() -> None:
    done = subprocess.run([sys.executable, "-c", SNAPSHOT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the shims are for machines without CUDA")
def test_cuda_means_cpu() -> None:
    assert install_cpu_runtime() is True
    assert install_cpu_runtime() is True
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.cuda.current_device() == torch.device("cpu")
    assert torch.ones(1).cuda().type() == "torch.cuda.FloatTensor"
    assert torch.empty(3, dtype=torch.int64, device="cuda", pin_memory=True).dtype == torch.int64
    assert torch.zeros(1, device="cpu").to(device="cuda").device.type == "cpu"
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
