"""The sides of the comparison of adapters, each measured in a process of its own: the trainer's, and peft with TRL's trainer."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.bench_checkpoint import resident
from benchmarks.inputs import read_pairs
from benchmarks.measure import counted_flops, peak_bytes, timed
from benchmarks.memory_layouts import live_bytes
from benchmarks.padded_baseline import StepResult
from benchmarks.sides import LEARNING_RATE, Step, build_state, our_step, token_lists
from benchmarks.trl_baseline import TrlBaseline
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.lora.held import held_factors
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime

# What peft reads of the adapter that ours begins with: name of a projection -> A.
FACTORS = "factors.pt"


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the sides.

    Attributes:
        name: of it.
        is_ours: whether the trainer's own step is taken.
        has_adapter: whether an adapter is trained instead of the whole model.
        recomputes: activations, in the backward pass.
    """

    name: str
    is_ours: bool = True
    has_adapter: bool = True
    recomputes: bool = False


SIDES = (
    Side("full", has_adapter=False),
    Side("lora"),
    Side("lora, recomputed", recomputes=True),
    Side("peft + TRL", is_ours=False),
    Side("peft + TRL, recomputed", is_ours=False, recomputes=True),
)


@dataclasses.dataclass(frozen=True)
class SideCost:
    """What a side was found to cost in a process of its own.

    Attributes:
        first_steps: results of the first two steps, which are not timed.
        cpu_seconds: of each step after them, of all threads.
        resident_bytes: most the resident set has grown by since packages were imported.
        num_parameters, num_trained: all parameters, with those of an adapter, and those that are trained.
        parameter_bytes: of all parameters.
        other_bytes: of all other tensors that are there between steps: gradients, optimizer.
        pass_bytes: most bytes of tensors in use in a step above those: activations, logits, temporaries; 0 where not counted.
        flops: of a step; 0 where not counted.
        tokens: of the pairs.
    """

    first_steps: tuple[StepResult, StepResult]
    cpu_seconds: list[float]
    resident_bytes: int
    num_parameters: int
    num_trained: int
    parameter_bytes: int
    other_bytes: int
    pass_bytes: int
    flops: float
    tokens: int


def cost_of(side: Side, options: argparse.Namespace, folder: Path, counts: bool) -> SideCost:
    """What a side costs, in this process, which has done nothing else.

    Args:
        side: which.
        options: of the command line.
        folder: of the Hugging Face model; sides with an adapter of ours write its A there, others read it.
        counts: whether bytes of a step and FLOPs are counted.
    """
    if not side.is_ours:
        _import_theirs()
        # Alone: as one rank of several it would wrap the model for sums of gradients.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    pairs = read_pairs(options)
    before = resident("VmRSS")
    live_before = live_bytes()
    groups = initialize_runtime(1, 1, seed=options.seed) if side.is_ours else None
    model, step = _ours(side, options, folder, pairs, groups) if side.is_ours else _theirs(side, options, folder, pairs)
    first = (step(), step())
    cpu_seconds = [timed(step)[1] for _ in range(2)]
    resident_bytes = resident("VmHWM") - before
    parameters = list(model.parameters())
    parameter_bytes = sum(one.nbytes for one in parameters)
    cost = SideCost(
        first_steps=first,
        cpu_seconds=cpu_seconds,
        resident_bytes=resident_bytes,
        num_parameters=sum(one.numel() for one in parameters),
        num_trained=sum(one.numel() for one in parameters if one.requires_grad),
        parameter_bytes=parameter_bytes,
        other_bytes=live_bytes() - live_before - parameter_bytes,
        pass_bytes=peak_bytes(step) if counts else 0,
        flops=counted_flops(step) if counts else 0.0,
        tokens=int(pairs.lengths.sum()),
    )
    if side.is_ours:
        shutdown_runtime()
    return cost


def _ours(side: Side, options: argparse.Namespace, folder: Path, pairs: Any, groups: Any) -> tuple[torch.nn.Module, Step]:
    state = build_state(
        read_architecture(folder),
        groups,
        bf16=options.bf16,
        recompute_granularity="full" if side.recomputes else None,
        model_dir=folder,
        lora_rank=options.rank if side.has_adapter else None,
    )
    if side.has_adapter:
        factors = {one.projection.name: one.parameter.detach() for one in held_factors(state.policy) if one.kind == "A"}
        torch.save(factors, folder / FACTORS)
    return state.policy, our_step(state, pairs, "simpo", groups, tokens_per_microbatch=options.tokens_per_microbatch)


def _theirs(side: Side, options: argparse.Namespace, folder: Path, pairs: Any) -> tuple[torch.nn.Module, Step]:
    import peft

    dtype = torch.bfloat16 if options.bf16 else torch.float32
    base = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    config = peft.LoraConfig(
        r=options.rank, lora_alpha=options.rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model: Any = peft.get_peft_model(base.train(), config)
    with torch.no_grad():
        for name, factor in torch.load(folder / FACTORS).items():
            model.get_submodule(f"base_model.model.{name}").lora_A["default"].weight.copy_(factor)
    if side.recomputes:
        # Frozen embeddings need no gradient, but what is computed anew has one only if its inputs have.
        model.enable_input_require_grads()
    trainer = TrlBaseline(
        model,
        token_lists(pairs),
        pairs_per_microbatch=options.pairs_per_microbatch,
        bf16=options.bf16,
        gradient_checkpointing=side.recomputes,
        learning_rate=LEARNING_RATE,
        output_dir=folder / "trl",
    )
    return model, trainer.step


def _import_theirs() -> None:
    """What would be imported while a side is measured.

    Raises:
        SystemExit: it is not installed.
    """
    try:
        import datasets  # noqa: F401
        import peft  # noqa: F401
        import trl.experimental.cpo  # type: ignore[import-not-found] # noqa: F401
    except ImportError as error:
        raise SystemExit(f"--trl: peft or TRL cannot be imported ({error}). Run: pip install 'megatron-rmipo[bench]'") from error
