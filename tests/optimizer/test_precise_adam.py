"""The precision-aware optimizer without CUDA: what it keeps, in how many bytes, and what that changes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rmipo.checkpoint.hf.weights import load_hf_weights
from megatron_rmipo.config.flags.memory import MemoryConfig
from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.schema import Config, ModelConfig, OptimizerConfig
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.build import build_model
from megatron_rmipo.optimizer.remainders import joined, split
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime
from megatron_rmipo.training.setup import TrainingState, build_training_state
from megatron_rmipo.training.step import _update
from tests.checkpoint.models import write_hf_model

CLIP = 0.5


def start(hf: Path, groups: ProcessGroups, memory: dict[str, Any], parallel: dict[str, Any] | None = None) -> TrainingState:
    config = Config(
        parallel=ParallelConfig(use_distributed_optimizer=True, **(parallel or {})),
        model=ModelConfig(make_vocab_size_divisible_by=8, bf16=True),
        optimizer=OptimizerConfig(lr=1e-2, lr_decay_style="constant", clip_grad=CLIP, weight_decay=0.1),
        memory=MemoryConfig(use_precision_aware_optimizer=bool(memory), **memory),
    )
    policy = build_model(read_architecture(hf), config, groups)
    load_hf_weights(policy, hf, policy.architecture, groups=groups)
    return build_training_state(policy, config, groups, train_iters=10)


def take_steps(state: TrainingState, num_steps: int) -> list[float]:
    """Steps with gradients that each weight makes of itself, larger than they are clipped to; the norms."""
    norms = []
    for _ in range(num_steps):
        for parameter in state.model.parameters():
            parameter.main_grad.copy_((3 * parameter.detach().float()).sin())
        norm, updated = _update(state.optimizer, allowed=True)
        assert updated
        norms.append(norm)
    return norms


def weights_of(state: TrainingState) -> torch.Tensor:
    return torch.cat([parameter.detach().float().flatten() for parameter in state.model.parameters()])


def bytes_held(state: TrainingState) -> tuple[float, float]:
    """Bytes a parameter of the optimizer's state, beside what the model has, and of the gradients."""
    count = sum(parameter.numel() for parameter in state.model.parameters())
    parts = getattr(state.optimizer, "chained_optimizers", [state.optimizer])
    held = [
        tensor for part in parts for states in part.optimizer.state.values() for name, tensor in states.items() if name != "step"
    ]
    if not state.optimizer.config.use_precision_aware_optimizer:
        held += [main for part in parts for group in part.shard_fp32_from_float16_groups for main in group]
    buffers = [buffer.grad_data for chunk in state.model.chunks for buffer in chunk.buffers]
    gradients = sum(buffer.numel() * buffer.element_size() for buffer in buffers)
    return sum(tensor.numel() * tensor.element_size() for tensor in held) / count, gradients / count


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, TrainingState, list[float]]]:
    """What begins a run, and one without the flag after four steps, with its norms."""
    groups = initialize_runtime()
    hf = write_hf_model(tmp_path_factory.mktemp("hf"), "qwen2")
    begin = functools.partial(start, hf, groups)
    state = begin({})
    yield begin, state, take_steps(state, 4)
    shutdown_runtime()


# Dtypes -> bytes a parameter of the optimizer's state and of the gradients, and the largest difference of a weight after four
# steps of 0.01: of bf16 weights below one, half a step of theirs is 2 ** -9.
DTYPES: list[tuple[dict[str, Any], float, float, float]] = [
    ({"main_grads_dtype": "fp32"}, 10, 4, 0.0),
    ({"main_grads_dtype": "bf16"}, 10, 2, 0.004),
    ({"main_params_dtype": "fp16"}, 10, 4, 0.008),
    ({"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}, 6, 4, 0.004),
    ({"exp_avg_dtype": "fp16", "exp_avg_sq_dtype": "fp16"}, 6, 4, 0.004),
    ({"exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "fp16"}, 5, 4, 0.016),
    ({"exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "fp8", "main_grads_dtype": "bf16"}, 4, 2, 0.016),
]


@pytest.mark.parametrize(("memory", "state_bytes", "gradient_bytes", "bound"), DTYPES)
def test_fewer_bytes_and_nearly_the_same_steps(
    plain: Any, memory: dict[str, Any], state_bytes: float, gradient_bytes: float, bound: float
) -> None:
    begin, expected, norms = plain
    state = begin(memory)
    assert norms[0] > CLIP
    assert take_steps(state, 4) == pytest.approx(norms, rel=1e-2 if bound else 0)
    before, found = bytes_held(expected), bytes_held(state)
    assert before[0] == 12
    # Buffers of gradients are padded a little.
    assert (found[0], found[1]) == pytest.approx((state_bytes, gradient_bytes), rel=0.01)
    assert float((weights_of(state) - weights_of(expected)).abs().max()) <= bound


def test_a_gradient_that_is_not_finite_updates_nothing(plain: Any) -> None:
    begin, *_ = plain
    state = begin({"main_grads_dtype": "bf16"})
    before = weights_of(state)
    for parameter in state.model.parameters():
        parameter.main_grad.fill_(float("inf"))
    assert not _update(state.optimizer, allowed=True)[1]
    assert torch.equal(weights_of(state), before)


def test_bf16_weights_and_remainders_are_fp32_weights() -> None:
    torch.manual_seed(3)
    # Halves between two bf16 numbers among them, and numbers of every size.
    drawn = torch.randn(4001) * 10.0 ** torch.randint(-30, 30, (4001,))
    halves = (torch.randn(999).bfloat16().float().view(torch.int32) + 0x8000).view(torch.float32)
    main = torch.cat([drawn, halves, torch.tensor([0.0, -0.0])])
    weights, remainders = split(main)
    assert (weights.dtype, remainders.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(joined(weights, remainders).view(torch.int32), main.view(torch.int32))
    assert torch.equal(weights[:4001], drawn.bfloat16())
    assert ((weights.float() - main).abs() <= 2.0**-8 * main.abs()).all()
