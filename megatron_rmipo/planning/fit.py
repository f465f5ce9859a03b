"""What the neediest rank of a layout holds: the estimate of :mod:`megatron_rmipo.memory`, for every pass of a step."""

from __future__ import annotations

from megatron_rmipo.config.schema import Config
from megatron_rmipo.data.batches.batch_layout import UNCONDITIONAL_PACK_FACTOR
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.memory.pack import PackSize
from megatron_rmipo.memory.stages import StageMemory, neediest, stage_memories
from megatron_rmipo.planning.short_numbers import figure

GIB = 2**30


def rank_memory(
    arch: ModelArchitecture,
    config: Config,
    gpus: int,
    num_scored: int,
    num_packs: int,
    *,
    mixed: bool = False,
    passes_before: bool = False,
) -> StageMemory:
    """What the rank that needs most needs of its GPU.

    Args:
        arch: the model.
        config: the flags, which fit it.
        gpus: all of them.
        num_scored: scored tokens of a full pack.
        num_packs: of a gradient pass on a rank.
        mixed: a reference's logits are mixed with the policy's; it stands beside, where it is not the policy without its adapter.
        passes_before: responses alone are scored in packs of their own, which hold more tokens.
    """
    capacity = config.data.tokens_per_microbatch
    alone = capacity * UNCONDITIONAL_PACK_FACTOR
    stages = stage_memories(
        arch,
        config,
        world_size=gpus,
        pack=PackSize(capacity, num_scored),
        scored_before=PackSize(alone, alone) if passes_before else None,
        num_microbatches=num_packs,
        reference=arch if mixed else None,
    )
    return neediest(stages)


def named_parts(memory: StageMemory) -> str:
    """The parts of a rank's peak worth naming, in GiB."""
    parts = memory.parts()
    # These two take turns.
    del parts[min("log-prob chunks", "working", key=lambda name: parts[name])]
    return ", ".join(f"{name} {figure(number / GIB)}" for name, number in parts.items() if number > 0.001 * memory.peak)
