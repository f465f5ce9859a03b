"""Megatron-Core's strategies to save tensors, without what they tell every rank of all others.

That tensors are covered once and whole needs no exchange of its own: the first rank, which is told all plans to describe the
files, refuses others (torch's ``DefaultSavePlanner``).
"""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy


class ReplicasInShares(FullyParallelSaveStrategyWrapper):
    """What several data-parallel ranks hold is dealt over them, at the first save; all of the group save together."""

    cached_distribution: Any

    def apply_saving_parallelization(self, sharded_state_dict: dict[str, Any]) -> None:
        """As Megatron-Core's, which at the first save gathers what all ranks of the job hold on each of them."""
        if self.cached_distribution is None:
            self.cached_distribution = determine_main_replica_uniform_distribution(sharded_state_dict, self.parallelization_group)
        distribute_main_replicas_with_precomputed_distribution(
            sharded_state_dict, self.parallelization_group, self.cached_distribution
        )


class TensorFiles(TorchDistSaveShardedStrategy):
    """The files of a ``torch_dist`` checkpoint, and on the first rank the metadata that says what lies where."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *strategy: str) -> Any:
        metadata = planned[1]
        if metadata is not None:
            # Megatron-Core would keep each rank's plan beside what it comes to. A load reads the file on every rank.
            vars(metadata).pop("all_local_plans", None)
        return super()._get_save_and_finalize_callbacks(writer, planned, *strategy)
