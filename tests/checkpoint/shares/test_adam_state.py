"""A run goes on with another optimizer's memory: other dtypes, a share on the host, several instances, or none of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rmipo.checkpoint.megatron.directory import checkpoint_path
from megatron_rmipo.checkpoint.megatron.loading import load_checkpoint
from megatron_rmipo.checkpoint.megatron.store import save_checkpoint
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime
from megatron_rmipo.training.setup import TrainingState
from tests.checkpoint.models import write_hf_model
from tests.checkpoint.shares.pretended_offload import pretend_device
from tests.checkpoint.shares.test_optimizer_pieces import stored_tensors
from tests.harness import run_distributed
from tests.optimizer.test_precise_adam import start, take_steps, weights_of

HALF_ON_HOST = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5, "overlap_cpu_optimizer_d2h_h2d": True}
# Name -> flags of memory, and how far off fewer digits may be after two steps of 0.01.
KINDS: dict[str, tuple[dict[str, Any], float]] = {
    "plain": ({}, 0.0),
    "remainders": ({"main_grads_dtype": "fp32"}, 0.0),
    "host": (HALF_ON_HOST, 0.0),
    "bf16": ({"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16", "main_grads_dtype": "bf16"}, 0.004),
    "small": ({"exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "fp16", "main_params_dtype": "fp16"}, 0.016),
}


def parts(state: TrainingState) -> dict[str, Any]:
    return {"model": state.model, "optimizer": state.optimizer, "scheduler": state.scheduler}


def check_going_on(hf: Path, folder: Path, groups: ProcessGroups, parallel: dict[str, int], kinds: Sequence[str]) -> None:
    """Each kind goes on from the plain optimizer's checkpoint as that one does, and that one from the checkpoint of each kind."""
    expected = torch.load(folder / "expected.pt")
    for kind in kinds:
        memory, bound = KINDS[kind]
        saved = start(hf, groups, memory, parallel)
        load_checkpoint(folder / "plain", **parts(saved), load_rng=False, groups=groups)
        name = f"{kind}-{groups.world_size}-{parallel.get('num_distributed_optimizer_instances', 1)}"
        save_checkpoint(folder / name, 2, **parts(saved), groups=groups, train_state={}, config={}, assets_dir=hf)
        take_steps(saved, 2)
        assert float((weights_of(saved) - expected).abs().max()) <= bound, name
        again = start(hf, groups, memory, parallel)
        load_checkpoint(folder / name, **parts(again), load_rng=False, groups=groups)
        take_steps(again, 2)
        assert torch.equal(weights_of(again), weights_of(saved)), name
        if not bound:
            # What is in the checkpoint does not tell which it was.
            assert_same(folder / name, folder / "plain")
        plain = start(hf, groups, {}, parallel)
        load_checkpoint(folder / name, **parts(plain), load_rng=False, groups=groups)
        take_steps(plain, 2)
        assert float((weights_of(plain) - expected).abs().max()) <= bound, name


def assert_same(one: Path, other: Path) -> None:
    found, expected = (stored_tensors(checkpoint_path(directory, 2)) for directory in (one, other))
    assert found.keys() == expected.keys()
    different = [key for key, tensor in expected.items() if not torch.equal(tensor, found[key])]
    assert not different, different


def run(hf: Path, folder: Path) -> None:
    pretend_device()
    groups = initialize_runtime()
    first = start(hf, groups, {})
    take_steps(first, 2)
    save_checkpoint(folder / "plain", 2, **parts(first), groups=groups, train_state={}, config={}, assets_dir=hf)
    take_steps(first, 2)
    if groups.rank == 0:
        torch.save(weights_of(first), folder / "expected.pt")
    groups.world.barrier().wait()
    check_going_on(hf, folder, groups, {}, list(KINDS)[1:])
    shutdown_runtime()


def run_in_instances(hf: Path, folder: Path) -> None:
    pretend_device()
    instances = {"num_distributed_optimizer_instances": 2}
    groups = initialize_runtime(**instances)
    check_going_on(hf, folder, groups, instances, ["plain", "bf16"])
    shutdown_runtime()


@pytest.mark.dist
@pytest.mark.slow
def test_a_run_goes_on_with_another_memory_of_its_optimizer(tmp_path: Path) -> None:
    hf = write_hf_model(tmp_path / "hf", "qwen2")
    run_distributed(run, 2, hf, tmp_path)
    pytest.importorskip("einops")
    run_distributed(run_in_instances, 4, hf, tmp_path)
