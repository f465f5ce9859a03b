"""Resuming training of a sparse model at another expert-parallel size: weights, Adam's moments and step counts go along."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rmipo.checkpoint.hf.weights import export_hf, load_hf_weights
from megatron_rmipo.checkpoint.megatron.loading import load_checkpoint
from megatron_rmipo.checkpoint.megatron.store import save_checkpoint
from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.schema import Config, ModelConfig, OptimizerConfig
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.build import build_model
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime
from megatron_rmipo.training.setup import TrainingState, build_training_state
from tests.checkpoint.models import write_hf_model
from tests.harness import run_distributed

pytestmark = pytest.mark.dist

BEFORE, AFTER = 2, 2


def start(hf: Path, parallel: ParallelConfig, groups: ProcessGroups) -> TrainingState:
    optimizer = OptimizerConfig(lr=1e-2, lr_decay_style="constant", clip_grad=0.0, weight_decay=0.1)
    config = Config(parallel=parallel, model=ModelConfig(make_vocab_size_divisible_by=8), optimizer=optimizer)
    policy = build_model(read_architecture(hf), config, groups)
    load_hf_weights(policy, hf, policy.architecture, groups=groups)
    return build_training_state(policy, config, groups, train_iters=10)


def take_steps(state: TrainingState, num_steps: int) -> None:
    """Steps with gradients that each weight makes of itself alone, so that no layout makes others."""
    for _ in range(num_steps):
        for parameter in state.model.parameters():
            parameter.main_grad.copy_((3 * parameter.detach().float()).sin())
        state.optimizer.step()
        state.scheduler.step(increment=1)


def train(hf: Path, folder: Path, name: str, sizes: dict[str, int], saves: bool) -> None:
    """Some steps, a checkpoint, the rest of the steps, an export; or the rest out of that checkpoint."""
    groups = initialize_runtime(
        sizes.get("tensor_model_parallel_size", 1),
        context_parallel_size=sizes.get("context_parallel_size", 1),
        expert_model_parallel_size=sizes.get("expert_model_parallel_size", 1),
        expert_tensor_parallel_size=sizes.get("expert_tensor_parallel_size"),
    )
    for distributed in (True, False):
        state = start(hf, ParallelConfig(**sizes, use_distributed_optimizer=distributed), groups)  # type: ignore[arg-type]
        stored = {"model": state.model, "optimizer": state.optimizer, "scheduler": state.scheduler, "groups": groups}
        checkpoints = folder / f"checkpoints-{distributed}"
        if saves:
            take_steps(state, BEFORE)
            save_checkpoint(checkpoints, BEFORE, **stored, train_state={}, config={}, assets_dir=hf)  # type: ignore[arg-type]
        else:
            load_checkpoint(checkpoints, **stored, load_rng=True)  # type: ignore[arg-type]
        take_steps(state, AFTER)
        export_hf(state.policy, state.policy.architecture, hf, folder / f"{name}-{distributed}", dtype=None, groups=groups)
    shutdown_runtime()


def tensors(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.slow
def test_training_goes_on_at_other_expert_parallel_sizes(tmp_path: Path) -> None:
    hf = write_hf_model(tmp_path / "hf", "qwen2_moe")
    run_distributed(train, 2, hf, tmp_path, "uninterrupted", {"expert_model_parallel_size": 2}, True)
    run_distributed(train, 1, hf, tmp_path, "alone", {}, False)
    both = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    run_distributed(train, 2, hf, tmp_path, "both", both, False)
    over_rows = {"context_parallel_size": 2, "expert_model_parallel_size": 2}
    run_distributed(train, 2, hf, tmp_path, "over rows", over_rows, False)
    for distributed in (True, False):
        expected = tensors(tmp_path / f"uninterrupted-{distributed}")
        assert not torch.equal(expected["lm_head.weight"], tensors(hf)["lm_head.weight"])
        for name in ("alone", "both", "over rows"):
            found = tensors(tmp_path / f"{name}-{distributed}")
            different = [key for key, tensor in expected.items() if not torch.equal(tensor, found[key])]
            assert not different, (name, distributed, different)
