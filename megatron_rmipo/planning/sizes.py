"""How many ranks share what under a layout, and over which links they meet."""

from __future__ import annotations

import dataclasses

from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.pipeline_split import num_chunks
from megatron_rmipo.model.problems.experts import expert_tensor_size
from megatron_rmipo.planning.hardware import Cluster


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A layout in numbers.

    Attributes:
        tp, pp, cp, dp: ranks of the tensor-, pipeline-, context- and data-parallel groups.
        ep, etp: ranks that hold different experts, and that share each of them.
        chunks: of a pipeline stage.
    """

    tp: int
    pp: int
    cp: int
    dp: int
    ep: int
    etp: int
    chunks: int

    @classmethod
    def of(cls, parallel: ParallelConfig, num_layers: int, gpus: int) -> Sizes:
        """Those of the flags, on so many GPUs."""
        tp, pp, cp = (
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.context_parallel_size,
        )
        return cls(
            *(tp, pp, cp),
            dp=gpus // (tp * pp * cp),
            ep=parallel.expert_model_parallel_size,
            etp=expert_tensor_size(parallel),
            chunks=num_chunks(num_layers, parallel),
        )

    @property
    def replicas(self) -> int:
        """Ranks that hold the same of all but the experts."""
        return self.dp * self.cp

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts."""
        return max(1, self.tp * self.cp * self.dp // (self.ep * self.etp))

    def __str__(self) -> str:
        parts = {"TP": self.tp, "PP": self.pp, "VPP": self.chunks, "CP": self.cp, "EP": self.ep, "DP": self.dp}
        return " x ".join(f"{name} {size}" for name, size in parts.items() if size > 1) or "one GPU"


@dataclasses.dataclass(frozen=True)
class Group:
    """Ranks that meet, and the links that they have for it.

    Attributes:
        size: ranks.
        local: those of them in a node.
        within_rate, between_rate: bytes a second of a rank, one direction.
    """

    size: int
    local: int
    within_rate: float
    between_rate: float

    @property
    def ring_rate(self) -> float:
        """Bytes a second that pass each rank of a ring: its ranks in a node share their links to other nodes."""
        return self.within_rate if self.local == self.size else min(self.within_rate, self.local * self.between_rate)

    @property
    def is_local(self) -> bool:
        """Whether they are in a node, all of them."""
        return self.local == self.size


def group(cluster: Cluster, size: int, stride: int) -> Group:
    """A group of every ``stride``-th rank; ranks of a node follow each other, as Megatron-Core numbers them.

    Args:
        cluster: the machines.
        size: ranks of the group.
        stride: ranks from one of them to the next.
    """
    local = max(1, min(size, cluster.gpus_per_node // stride))
    return Group(size, local, cluster.within_rate, cluster.between_rate)
