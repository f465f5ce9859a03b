"""The sides of a comparison: the trainer's step, and those of others, each over the same pairs and from the same weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.inputs import BOS, Pairs, step_costs
from benchmarks.padded_baseline import PaddedBaseline, Pair, StepResult
from benchmarks.trl_baseline import TrlBaseline
from megatron_rmipo.checkpoint.adapter_source import adapters_of_flags
from megatron_rmipo.checkpoint.hf.weights import load_hf_weights
from megatron_rmipo.config.flags.lora import LoraConfig
from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig
from megatron_rmipo.data.batches.batch_builder import BatchBuilder
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.sizes import check_capacity
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.model.build import build_model
from megatron_rmipo.model.flops import forward_cost_model
from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.passes.layout import conditional_layout
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.training.setup import TrainingState, build_training_state
from megatron_rmipo.training.step import train_step

LEARNING_RATE = 1e-4
Step = Callable[[], StepResult]


def trainer_config(
    *,
    bf16: bool,
    recompute_granularity: str | None = None,
    tokens_per_microbatch: int | None = None,
    tensor_model_parallel_size: int = 1,
    lora_rank: int | None = None,
) -> Config:
    """The trainer's flags, all others at their defaults."""
    recompute: dict[str, Any] = {"recompute_granularity": recompute_granularity}
    if recompute_granularity == "full":
        recompute |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    return Config(
        model=ModelConfig(bf16=bf16, **recompute),
        data=DataConfig() if tokens_per_microbatch is None else DataConfig(tokens_per_microbatch=tokens_per_microbatch),
        optimizer=OptimizerConfig(lr=LEARNING_RATE, lr_decay_style="constant"),
        parallel=ParallelConfig(tensor_model_parallel_size=tensor_model_parallel_size),
        lora=LoraConfig(lora_rank=lora_rank),
    )


def build_state(
    arch: ModelArchitecture,
    groups: ProcessGroups,
    *,
    bf16: bool,
    recompute_granularity: str | None = None,
    model_dir: Path | None = None,
    lora_rank: int | None = None,
) -> TrainingState:
    """The trainer's model and optimizer, with the weights of a Hugging Face directory, or random ones without it.

    With a ``lora_rank`` they are frozen, and an adapter of all linear layers is trained.
    """
    config = trainer_config(
        bf16=bf16,
        recompute_granularity=recompute_granularity,
        tensor_model_parallel_size=groups.tp_size,
        lora_rank=lora_rank,
    )
    policy = build_model(arch, config, groups)
    if model_dir is not None:
        load_hf_weights(policy, model_dir, arch, groups=groups)
    if config.lora.is_on:
        adapters_of_flags(arch, config.lora).add_to(policy, arch, groups, seed=config.training.seed)
    return build_training_state(policy, config, groups, train_iters=1000)


def batch_builder(
    pairs: Pairs, arch: ModelArchitecture, objective: Objective, tokens_per_microbatch: int, **layout: Any
) -> BatchBuilder:
    """What cuts and lays out the trainer's batches of these pairs, rows padded as it pads them, for one rank.

    Raises:
        ConfigError: a pair does not fit into a micro-batch.
    """
    config = trainer_config(bf16=True, tokens_per_microbatch=tokens_per_microbatch)
    settings = dataclasses.replace(
        conditional_layout(config, arch, dp_rank=0, dp_size=1),
        unconditional=objective.needs.unconditional,
        bos_token_id=BOS,
        **layout,
    )
    check_capacity([(0, settings.conditional_tokens(pairs.lengths))], tokens_per_microbatch, lambda index: f"pair {index}")
    return BatchBuilder(PairCollection([pairs]), settings)  # type: ignore[list-item]


def our_step(
    state: TrainingState, pairs: Pairs, objective_name: str, groups: ProcessGroups, *, tokens_per_microbatch: int
) -> Step:
    """The trainer's own step, cut and laid out anew each time."""
    objective = build_objective(objective_name, {})
    builder = batch_builder(pairs, state.policy.architecture, objective, tokens_per_microbatch)

    def step() -> StepResult:
        outcome = train_step(state, builder.build(np.arange(len(pairs))), objective, groups)
        return StepResult(outcome.metrics.values["loss"], outcome.grad_norm)

    return step


def padded_step(model_dir: Path, pairs: Pairs, *, recompute: bool, **settings: Any) -> Step:
    """The padded step; ``settings`` are those of :class:`PaddedBaseline`."""
    model = read_hf_model(model_dir)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    baseline = PaddedBaseline(model, bos_token_id=BOS, learning_rate=LEARNING_RATE, **settings)
    rows = token_lists(pairs)
    return lambda: baseline.step(rows)


def trl_step(model_dir: Path, pairs: Pairs, **settings: Any) -> Step:
    """TRL's step; ``settings`` are those of :class:`TrlBaseline`."""
    rows = token_lists(pairs)
    return TrlBaseline(read_hf_model(model_dir), rows, learning_rate=LEARNING_RATE, **settings).step


def read_hf_model(model_dir: Path) -> Any:
    """The model as transformers builds it, fp32, in training mode, on the device."""
    model = transformers.LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="sdpa")
    return model.train().to("cuda" if torch.cuda.is_available() else "cpu")


def token_lists(pairs: Pairs) -> list[Pair]:
    """The pairs as lists of token ids."""
    return [(pair.prompt.tolist(), pair.chosen.tolist(), pair.rejected.tolist()) for pair in pairs]


def check_agreement(ours: Step, others: dict[str, Step], tolerance: float) -> float:
    """Two steps of each, compared with ours pair by pair; the largest relative difference.

    Raises:
        SystemExit: one differs by more than ``tolerance``.
    """
    worst = 0.0
    for number in (1, 2):
        mine = ours()
        for name, other in others.items():
            worst = max(worst, compare(mine, other(), f"step {number}: ours and {name}", tolerance))
    return worst


def differences(mine: StepResult, theirs: StepResult) -> tuple[float, float]:
    """The largest relative difference of a pair's loss, and that of the gradient norm."""
    losses = ((mine.losses - theirs.losses).abs() / theirs.losses.abs().clamp(min=1e-3)).max().item()
    return losses, abs(mine.grad_norm - theirs.grad_norm) / theirs.grad_norm


def compare(mine: StepResult, theirs: StepResult, title: str, tolerance: float) -> float:
    """The largest relative difference of a pair's loss or of the gradient norm.

    Raises:
        SystemExit: it is above ``tolerance``.
    """
    losses, norms = differences(mine, theirs)
    # Not max(), which passes over NaN.
    if not (losses <= tolerance and norms <= tolerance):
        raise SystemExit(
            f"{title} do not agree (losses {losses:.1e}, gradient norm {norms:.1e}, tolerance {tolerance:.0e}): nothing measured"
        )
    return max(losses, norms)


def minimum_flops(arch: ModelArchitecture, pairs: Pairs, objective_name: str) -> float:
    """FLOPs of one step without a token, a kept attention score or a scored token too many, and nothing recomputed."""
    unconditional = build_objective(objective_name, {}).needs.unconditional
    layout = BatchLayout(0, 1, 0, forward_cost_model(arch), unconditional=unconditional, bos_token_id=BOS)
    return float(step_costs(pairs.lengths, layout).sum())
