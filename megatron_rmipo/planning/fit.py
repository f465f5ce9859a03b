"""What the neediest rank of a layout holds: the estimate of :mod:`megatron_rmipo.memory`, stage by stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megatron_rmipo.config.schema import Config
from megatron_rmipo.data.batches.batch_layout import UNCONDITIONAL_PACK_FACTOR
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.memory.estimate import PackSize, pack_memory, standing_memory
from megatron_rmipo.planning.sizes import Sizes

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class RankMemory:
    """Bytes of a rank.

    Attributes:
        stage: its pipeline stage, from 0.
        parts: name -> bytes.
    """

    stage: int
    parts: Mapping[str, float]

    @property
    def peak(self) -> float:
        """All parts together."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        return ", ".join(f"{name} {number / GIB:.1f}" for name, number in self.parts.items() if number > 0.05 * GIB)


def rank_memory(
    arch: ModelArchitecture,
    config: Config,
    gpus: int,
    num_scored: int,
    num_packs: int,
    *,
    mixed: bool = False,
    passes_before: bool = False,
) -> RankMemory:
    """What the rank that needs most needs of its GPU.

    Args:
        arch: the model.
        config: the flags, which fit it.
        gpus: all of them.
        num_scored: scored tokens of a full pack.
        num_packs: of a gradient pass on a rank.
        mixed: a reference stands beside the policy, and its logits are mixed with the policy's.
        passes_before: responses alone are scored in packs of their own, which hold more tokens.
    """
    sizes = Sizes.of(config.parallel, arch.num_layers, gpus)
    standing = standing_memory(arch, config, sizes.replicas)
    capacity = config.data.tokens_per_microbatch
    packs = [(True, PackSize(capacity // sizes.cp, num_scored // sizes.cp))]
    if passes_before:
        capacity *= UNCONDITIONAL_PACK_FACTOR
        packs.append((False, PackSize(capacity // sizes.cp, capacity // sizes.cp)))
    held = {
        "weights": standing.weights * (1 + mixed),
        "gradients": standing.gradients,
        "optimizer": standing.optimizer,
    }
    found = []
    for stage in {0, sizes.pp - 1}:
        for backward, pack in packs:
            one = pack_memory(
                arch,
                config,
                pack,
                backward=backward,
                packs_in_flight=min(sizes.pp - stage, num_packs),
                mixed=mixed,
                fused=True,
                last_stage=stage == sizes.pp - 1,
            )
            found.append(RankMemory(stage, {**held, "activations": one.activations, "working": one.peak - one.activations}))
    return max(found, key=lambda one: one.peak)
