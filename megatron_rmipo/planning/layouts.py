"""Which layouts of a model on some machines there are: flags by which the trainer would start."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_rmipo.config.flag_problems import parallel_problems, recompute_problems
from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.pipeline_split import best_split, stage_layers
from megatron_rmipo.config.schema import Config
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.model.layers.recomputation import recompute_module_problems
from megatron_rmipo.model.problems.layout import layout_problems
from megatron_rmipo.planning.hardware import Cluster

# Fewer tokens of a pack on a rank leave matrix products too small.
LEAST_TOKENS_OF_RANK = 1024
# Sizes of packs that are looked at, each twice the one before.
MOST_PACK_SIZES = 5
ROUND_TOKENS = 512
MOST_CHUNKS, MOST_CHUNK_COUNTS = 8, 3
RECOMPUTATIONS: tuple[Mapping[str, Any], ...] = (
    {},
    {"recompute_granularity": "selective"},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
)


def layouts(base: Config, arch: ModelArchitecture, cluster: Cluster, least: int, head: float = 0.0) -> Iterator[Config]:
    """Every layout that the trainer takes, each with one recomputation and one size of packs.

    Powers of two and what the model's layers give; tensor parallelism stays within a node.

    Args:
        base: the flags that stand.
        arch: the model.
        cluster: the machines.
        least: tokens of the largest pair, which context-parallel ranks share.
        head: what the output layer costs, as so many layers.
    """
    for parallel in _parallel(base, arch, cluster, max(1, least // LEAST_TOKENS_OF_RANK), head):
        config = dataclasses.replace(base, parallel=parallel)
        if not any(True for _ in problems(config, arch, cluster.gpus)):
            for recomputation in RECOMPUTATIONS:
                recomputing = dataclasses.replace(config, model=dataclasses.replace(base.model, **recomputation))
                if not any(True for _ in recompute_module_problems(recomputing, arch)):
                    yield recomputing


def problems(config: Config, arch: ModelArchitecture, gpus: int) -> Iterator[str]:
    """What the trainer would say of the layout."""
    yield from parallel_problems(config)
    yield from recompute_problems(config)
    yield from layout_problems(config, arch, gpus)


def with_packs(config: Config, tokens: int) -> Config:
    """With packs of so many tokens."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokens_per_microbatch=tokens))


def pack_sizes(least: int, most: float, context_ranks: int) -> list[int]:
    """Tokens a pack that are worth looking at.

    Args:
        least: that the largest pair needs.
        most: beyond which a rank's share of a step is one pack anyway.
        context_ranks: that share a pack.
    """
    first = -(-least // ROUND_TOKENS) * ROUND_TOKENS
    doubled = [1 << number for number in range(first.bit_length(), first.bit_length() + MOST_PACK_SIZES)]
    smallest = LEAST_TOKENS_OF_RANK * context_ranks
    sizes = [size for size in (first, *doubled) if size >= smallest]
    return [size for number, size in enumerate(sizes) if number == 0 or sizes[number - 1] < most][:MOST_PACK_SIZES]


def _parallel(
    base: Config, arch: ModelArchitecture, cluster: Cluster, most_context: int, head: float
) -> Iterator[ParallelConfig]:
    """Flags of parallelism, those that cannot work among them."""
    gpus = cluster.gpus
    splits = functools.cache(lambda pipeline: list(_splits(base.parallel, arch.num_layers, pipeline, head)))
    for tensor in _powers(cluster.gpus_per_node):
        for pipeline in _divisors(gpus // tensor, arch.num_layers):
            for context in _powers(min(most_context, gpus // (tensor * pipeline))):
                replicas, rest = divmod(gpus, tensor * pipeline * context)
                if rest or replicas > base.training.global_batch_size:
                    continue
                shared = replicas * context > 1
                common: dict[str, Any] = {
                    "tensor_model_parallel_size": tensor,
                    "sequence_parallel": tensor > 1,
                    "use_distributed_optimizer": shared,
                    "overlap_grad_reduce": shared,
                    "overlap_param_gather": shared,
                }
                for split in splits(pipeline):
                    for experts in _experts(arch, tensor, gpus // pipeline):
                        for shared_rows in _shared_rows(context):
                            yield dataclasses.replace(split, **common, **experts, **shared_rows)


def _shared_rows(context: int) -> Iterator[dict[str, Any]]:
    """How so many ranks share rows; heads are exchanged where they can be dealt out."""
    yield {"context_parallel_size": context}
    if context > 1:
        yield {"context_parallel_size": context, "cp_comm_type": "a2a"}


def _experts(arch: ModelArchitecture, tensor: int, ranks: int) -> Iterator[dict[str, Any]]:
    """How experts are spread over the ranks of a stage; each is whole on its rank."""
    if arch.experts is None:
        yield {}
        return
    for size in _powers(min(ranks, arch.experts.num_experts)):
        yield {"expert_model_parallel_size": size, "expert_tensor_parallel_size": 1 if tensor > 1 else None}


def _splits(base: ParallelConfig, num_layers: int, pipeline: int, head: float) -> Iterator[ParallelConfig]:
    """How layers are split over stages and their chunks: so that the output layer is made up for, and as evenly as they go."""
    one_chunk = dataclasses.replace(base, pipeline_model_parallel_size=pipeline)
    if pipeline == 1:
        yield one_chunk
        return
    counts = range(2, min(num_layers // pipeline, MOST_CHUNKS) + 1)
    chunked = [dataclasses.replace(one_chunk, num_virtual_stages_per_pipeline_rank=number) for number in counts]
    found = [splits for parallel in chunked if (splits := _best_splits(parallel, num_layers, head))]
    # The fewest chunks, the most, and some between.
    places = {number * (len(found) - 1) // (MOST_CHUNK_COUNTS - 1) for number in range(MOST_CHUNK_COUNTS) if found}
    yield from _best_splits(one_chunk, num_layers, head)
    for place in sorted(places):
        yield from found[place]


def _best_splits(parallel: ParallelConfig, num_layers: int, head: float) -> list[ParallelConfig]:
    """With the output layer made up for, and without, where the first stages have no room for it."""
    found = [best_split(num_layers, cost, parallel) for cost in (head, 0.0)]
    split = {one.parallel: None for one in found if one is not None}
    # Without a layer a chunk is all wait.
    return [one for one in split if all(all(chunks) for chunks in stage_layers(num_layers, one))]


def _powers(most: int) -> list[int]:
    return [1 << number for number in range(most.bit_length()) if 1 << number <= most]


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]
