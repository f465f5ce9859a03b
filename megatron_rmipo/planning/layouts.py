"""Which layouts of a model on some machines there are: flags by which the trainer would start."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_rmipo.config.flag_problems import parallel_problems, recompute_problems
from megatron_rmipo.config.schema import Config
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.model.layers.recomputation import recompute_module_problems
from megatron_rmipo.model.layout_problems import layout_problems
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


def layouts(base: Config, arch: ModelArchitecture, cluster: Cluster, least: int) -> Iterator[Config]:
    """Every layout that the trainer takes, each with one recomputation and one size of packs.

    Powers of two and what the model's layers give; tensor parallelism stays within a node.

    Args:
        base: the flags that stand.
        arch: the model.
        cluster: the machines.
        least: tokens of the largest pair, which context-parallel ranks share.
    """
    for parallel in _parallel(base, arch, cluster, max(1, least // LEAST_TOKENS_OF_RANK)):
        config = dataclasses.replace(base, parallel=dataclasses.replace(base.parallel, **parallel))
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


def _parallel(base: Config, arch: ModelArchitecture, cluster: Cluster, most_context: int) -> Iterator[dict[str, Any]]:
    """Flags of parallelism, those that cannot work among them."""
    gpus = cluster.gpus
    for tensor in _powers(cluster.gpus_per_node):
        for pipeline in _divisors(gpus // tensor, arch.num_layers):
            for context in _powers(min(most_context, gpus // (tensor * pipeline))):
                replicas, rest = divmod(gpus, tensor * pipeline * context)
                if rest or replicas > base.training.global_batch_size:
                    continue
                shared = replicas * context > 1
                common = {
                    "tensor_model_parallel_size": tensor,
                    "sequence_parallel": tensor > 1,
                    "context_parallel_size": context,
                    "use_distributed_optimizer": shared,
                    "overlap_grad_reduce": shared,
                    "overlap_param_gather": shared,
                }
                for split in _splits(arch, pipeline):
                    for experts in _experts(arch, tensor, gpus // pipeline):
                        yield {**common, **experts, **split}


def _experts(arch: ModelArchitecture, tensor: int, ranks: int) -> Iterator[dict[str, Any]]:
    """How experts are spread over the ranks of a stage; each is whole on its rank."""
    if arch.experts is None:
        yield {}
        return
    for size in _powers(min(ranks, arch.experts.num_experts)):
        yield {"expert_model_parallel_size": size, "expert_tensor_parallel_size": 1 if tensor > 1 else None}


def _splits(arch: ModelArchitecture, pipeline: int) -> Iterator[dict[str, Any]]:
    """How layers are split over stages and their chunks: evenly, with the output layer or both tables in the place of a layer."""
    if pipeline == 1:
        yield {"pipeline_model_parallel_size": 1}
        return
    accounts: Sequence[tuple[bool, bool]] = ((False, False), (False, True), (True, True))
    for embedding, loss in accounts:
        counted = arch.num_layers + embedding + loss
        if counted % pipeline:
            continue
        split: dict[str, Any] = {"pipeline_model_parallel_size": pipeline}
        if embedding:
            split["account_for_embedding_in_pipeline_split"] = True
        if loss:
            split["account_for_loss_in_pipeline_split"] = True
        yield split
        each = counted // pipeline
        counts = [number for number in range(2, min(each, MOST_CHUNKS) + 1) if each % number == 0]
        for chunks in {
            counts[number * (len(counts) - 1) // (MOST_CHUNK_COUNTS - 1)] for number in range(MOST_CHUNK_COUNTS) if counts
        }:
            # A chunk that holds a table instead of a layer must hold a layer, too.
            if not (loss and each == chunks):
                yield {**split, "num_layers_per_virtual_pipeline_stage": each // chunks}


def _powers(most: int) -> list[int]:
    return [1 << number for number in range(most.bit_length()) if 1 << number <= most]


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]
