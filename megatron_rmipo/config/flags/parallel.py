"""The flags of parallelism."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from megatron_rmipo.config.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Parallelism: how ranks share the model, the batch and the optimizer."""

    tensor_model_parallel_size: int = option(1, "Ranks that share every layer and the vocabulary (TP).")
    pipeline_model_parallel_size: int = option(1, "Pipeline stages (PP); each holds as many layers, unless flags say otherwise.")
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None,
        "Interleaved pipeline: layers of each of the chunks that a stage holds; unset: one chunk a stage. Chunks shorten "
        "the wait for the first and last packs, for more messages.",
    )
    num_virtual_stages_per_pipeline_rank: int | None = option(
        None, "The same as a number of chunks of each stage, for stages that differ, too."
    )
    decoder_first_pipeline_num_layers: int | None = option(
        None, "Layers of the first pipeline stage; the others share the rest evenly. Unset: as many as the others."
    )
    decoder_last_pipeline_num_layers: int | None = option(
        None, "Layers of the last pipeline stage, which has the output layer, too. Unset: as many as the others."
    )
    account_for_embedding_in_pipeline_split: bool = option(
        False, "Count the embedding as a layer when layers are split over stages: the first one holds a layer less."
    )
    account_for_loss_in_pipeline_split: bool = option(
        False, "Count the output layer as a layer when layers are split over stages: the last one holds a layer less."
    )
    context_parallel_size: int = option(
        1,
        "Ranks that share each row along its tokens (CP), so that pairs may be longer than one of them could hold.",
    )
    cp_comm_type: Literal["all_gather", "a2a", "p2p"] = option(
        "all_gather",
        "How attention meets the tokens of other context-parallel ranks. all_gather: keys and values of all are gathered in each "
        "layer. a2a: each rank computes all tokens for a part of the heads. p2p, Megatron's ring, is refused.",
    )
    expert_model_parallel_size: int = option(
        1, "Ranks that hold different experts of each layer (EP), out of the data-, context- and tensor-parallel ones."
    )
    expert_tensor_parallel_size: int | None = option(None, "Ranks that share each expert; unset: as many as share every layer.")
    sequence_parallel: bool = option(
        False, "Split activations outside attention and MLP over the tensor-parallel ranks, along the tokens. Needs TP > 1."
    )
    use_distributed_optimizer: bool = option(
        False, "Shard optimizer state and fp32 weights over data-parallel ranks, CP among them."
    )
    num_distributed_optimizer_instances: int = option(
        1,
        "Copies of the distributed optimizer's state; each is sharded over so many times fewer ranks, and weights are gathered "
        "among these alone. Must divide the data-parallel ranks.",
    )
    overlap_grad_reduce: bool = option(False, "Reduce gradients over data-parallel ranks while the backward pass runs.")
    overlap_param_gather: bool = option(
        False,
        "Gather updated weights during the next forward pass. Needs --use-distributed-optimizer and --overlap-grad-reduce.",
    )
    distributed_backend: Literal["nccl", "gloo"] | None = option(
        None, "Communication library; unset: nccl with CUDA, gloo without."
    )
    distributed_timeout_minutes: float = option(10.0, "Minutes a collective may wait for a rank before all ranks fail.")
    check_links: bool = option(
        False,
        "Before anything is loaded, time a collective over every process group and each rank's exchange with its neighbours, "
        "show a table, and name what is slow. Seconds.",
    )

    def runtime_arguments(self) -> dict[str, Any]:
        """What :func:`megatron_rmipo.runtime.groups.initialize_runtime` takes of these flags, by its names."""
        groups = (
            *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
            *("expert_model_parallel_size", "expert_tensor_parallel_size", "num_distributed_optimizer_instances"),
        )
        sizes = {name: getattr(self, name) for name in groups}
        return {**sizes, "backend": self.distributed_backend, "timeout_minutes": self.distributed_timeout_minutes}
