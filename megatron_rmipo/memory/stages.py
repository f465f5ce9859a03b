"""What each pipeline stage of a layout needs, from the model's sizes and the flags alone: the one door to the estimate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron_rmipo.config.schema import Config
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.memory.estimate import PackMemory, pack_memory
from megatron_rmipo.memory.pack import PackSize
from megatron_rmipo.memory.standing import StandingMemory, standing_memory


@dataclasses.dataclass(frozen=True)
class HostMemory:
    """Bytes of the host that a rank takes, beside its program.

    Attributes:
        optimizer: what an optimizer there holds.
        activations: kept there from forward to backward.
        checkpoint: the copy that a checkpoint is written from beside the next steps.
    """

    optimizer: float = 0.0
    activations: float = 0.0
    checkpoint: float = 0.0

    @property
    def total(self) -> float:
        """Bytes of all of them."""
        return self.optimizer + self.activations + self.checkpoint


@dataclasses.dataclass(frozen=True)
class StageMemory:
    """Bytes of a rank of a pipeline stage.

    Attributes:
        stage: from 0.
        standing: whatever the batch.
        pack: of the packs at work, of the pass that needs most.
        host: of the host.
    """

    stage: int
    standing: StandingMemory
    pack: PackMemory
    host: HostMemory

    @property
    def peak(self) -> float:
        """Most bytes of the device at one time."""
        return self.standing.total + self.pack.peak

    def parts(self) -> dict[str, float]:
        """Bytes of the device by name; the last two take turns, and the peak has the larger."""
        return {
            "weights": self.standing.weights,
            "reference": self.standing.reference,
            "gradients": self.standing.gradients,
            "optimizer": self.standing.optimizer,
            "activations": self.pack.activations,
            "attention masks": self.pack.masks,
            "log-prob chunks": self.pack.head,
            "working": self.pack.layer,
        }


def stage_memories(
    arch: ModelArchitecture,
    config: Config,
    *,
    world_size: int,
    pack: PackSize,
    scored_before: PackSize | None = None,
    num_microbatches: int | None = None,
    reference: ModelArchitecture | None = None,
    fused: bool = True,
    trains: bool = True,
) -> tuple[StageMemory, ...]:
    """What a rank of each pipeline stage needs. The flags must fit the model.

    Args:
        arch: the model.
        config: the run's flags.
        world_size: all ranks; what tensor, pipeline and context parallelism leave of them is data-parallel.
        pack: a full pack, the whole row that context-parallel ranks share.
        scored_before: a pack of a forward-only pass, where it is of another size: of responses alone.
        num_microbatches: packs of a gradient pass on a rank; None: enough that the pipeline is full.
        reference: the model whose logits an objective mixes with the policy's, and which stands beside it; but the policy
            without its adapter where it has one and the flags name no other.
        fused: kernels as on a GPU; False: as torch computes on the CPU.
        trains: False for forward-only passes alone, as for scoring.
    """
    memories, model = [], config.model
    is_policy = config.lora.is_on and model.reference_hf is None and model.reference_load is None
    beside = None if is_policy else reference
    for stage in range(config.parallel.pipeline_model_parallel_size):
        standing = standing_memory(arch, config, world_size, stage, trains=trains, reference=beside)
        passes = [
            pack_memory(
                arch,
                config,
                size,
                backward=backward,
                stage=stage,
                num_microbatches=num_microbatches,
                mixed=reference is not None,
                fused=fused,
            )
            for backward, size in ((False, scored_before or pack), (trains, pack))
        ]
        most = max(passes, key=lambda one: one.peak)
        memories.append(StageMemory(stage, standing, most, _host_memory(config, standing, most)))
    return tuple(memories)


def neediest(memories: Sequence[StageMemory]) -> StageMemory:
    """The stage whose ranks need most of their device; the first of several."""
    return max(memories, key=lambda one: one.peak)


def _host_memory(config: Config, standing: StandingMemory, pack: PackMemory) -> HostMemory:
    copied = standing.weights + standing.optimizer if config.checkpoint.async_save else 0.0
    return HostMemory(standing.host_optimizer, pack.host, copied)
