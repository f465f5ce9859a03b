"""Layouts and devices that a model cannot run on: a line each, with numbers that would work."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Iterator, Sequence

import torch

from megatron_rmipo.config.flag_problems import expert_problems, parallel_problems, recompute_problems, refuse
from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.pipeline_split import num_chunks, split_problems, stage_layers
from megatron_rmipo.config.schema import Config
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.foreign import ForeignArchitecture
from megatron_rmipo.model.attention.flex import LEAST_HEAD_SIZE
from megatron_rmipo.model.hybrid import NO_HYBRID_MODEL, HybridModel
from megatron_rmipo.model.layers.activation_offloading import offload_module_problems
from megatron_rmipo.model.layers.recomputation import recompute_module_problems
from megatron_rmipo.model.problems.experts import expert_kernel_problems, expert_layout_problems, expert_tensor_size
from megatron_rmipo.model.problems.quantization import quantization_machine_problems, quantization_width_problems
from megatron_rmipo.model.transformer_engine import (
    fp8_width_problems,
    memory_machine_problems,
    transformer_engine_problems,
)
from megatron_rmipo.torchrun import read_launch


def refuse_impossible_layout(config: Config, architecture: ModelArchitecture, world_size: int) -> None:
    """Refuse what cannot work of a command that trains nothing.

    Raises:
        ConfigError: one line per fault: the flags, their values, and values that would work.
    """
    # A batch size is not a matter of such a command, nor is fp8, which a policy is trained in.
    config = dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, global_batch_size=world_size),
        model=dataclasses.replace(config.model, fp8_format=None, fp8_recipe=None),
    )
    flags = [
        *parallel_problems(config),
        *recompute_problems(config),
        *expert_problems(config.experts),
        *machine_problems(config),
    ]
    refuse([*flags, *layout_problems(config, architecture, world_size)])


def machine_problems(config: Config) -> Iterator[str]:
    """What this machine, its devices and what is installed for them, cannot do."""
    yield from _device_problems(config)
    yield from transformer_engine_problems(config.model)
    yield from expert_kernel_problems(config.experts, config.model)
    yield from memory_machine_problems(config)
    yield from quantization_machine_problems(config)
    if config.parallel.num_distributed_optimizer_instances > 1 and importlib.util.find_spec("einops") is None:
        yield "--num-distributed-optimizer-instances: einops is not installed, which Megatron-Core needs. pip install einops"
    if config.model.model_class == "hybrid" and HybridModel is None:
        yield f"--model-class hybrid: {NO_HYBRID_MODEL}"


def layout_problems(config: Config, arch: ModelArchitecture, world_size: int) -> Iterator[str]:
    """What of the layout does not fit the model, or the number of ranks."""
    tensor, pipeline = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    context = config.parallel.context_parallel_size
    if tensor < 1 or pipeline < 1 or context < 1:
        return
    works = tensor_sizes(arch)
    if tensor not in works:
        mlps = "".join(f" and {width} MLP channels" for width in arch.mlp_widths)
        yield (
            f"--tensor-model-parallel-size {tensor} does not divide the model's {arch.num_attention_heads} attention heads, "
            f"{arch.num_query_groups} key/value heads{mlps} alike{_why_not_above(arch, tensor)}; would work: {_list(works)}"
        )
    if tensor in works:
        yield from latent_problems(arch, tensor)
    splits_badly = list(split_problems(arch.num_layers, config.parallel))
    yield from splits_badly
    ranks = tensor * pipeline * context
    if world_size % ranks:
        nearest = ranks * max(1, world_size // ranks)
        sizes, names = f"TP {tensor} x PP {pipeline}", "TP x PP"
        if context > 1:
            sizes, names = f"{sizes} x CP {context}", f"{names} x CP"
        yield (
            f"{sizes} needs a multiple of {ranks} ranks, but there are {world_size}; start {nearest} with "
            f"torchrun --nproc-per-node, or choose {names} among {_list(_divisors(world_size))}"
        )
    elif config.training.global_batch_size < world_size // ranks:
        yield (
            f"--global-batch-size {config.training.global_batch_size} leaves some of the {world_size // ranks} data-parallel "
            f"ranks without a pair; at least {world_size // ranks} would work"
        )
    if world_size % ranks == 0:
        yield from instance_problems(config.parallel, world_size)
    if config.data.seq_length > arch.longest_sequence:
        yield (
            f"--seq-length {config.data.seq_length} is longer than the model's {arch.length_limit}; "
            f"up to {arch.longest_sequence} would work"
        )
    if config.model.attention_backend == "te" and arch.attention_softcap is not None:
        yield (
            f"--attention-backend te caps no attention scores, and the model's are capped at {arch.attention_softcap:g}; flex "
            "would work on a GPU, sdpa anywhere"
        )
    if config.model.attention_backend == "flex" and arch.least_head_size < LEAST_HEAD_SIZE:
        yield (
            f"--attention-backend flex takes heads of {LEAST_HEAD_SIZE} or more channels, the model's have "
            f"{arch.least_head_size}; sdpa would work, and is what auto takes there"
        )
    if context > 1 and tensor in works:
        yield from _context_problems(config, arch)
    if tensor in works:
        yield from fp8_width_problems(config.model, arch, tensor)
        yield from quantization_width_problems(config, arch)
    yield from expert_layout_problems(config, arch, world_size)
    yield from recompute_module_problems(config, arch)
    yield from offload_module_problems(config, arch)
    if not splits_badly:
        yield from _recompute_problems(config, arch)


def _recompute_problems(config: Config, arch: ModelArchitecture) -> Iterator[str]:
    layers = max(len(chunk) for chunks in stage_layers(arch.num_layers, config.parallel) for chunk in chunks)
    if config.model.recompute_num_layers is not None and config.model.recompute_num_layers > layers:
        chunk = "a pipeline stage" if num_chunks(arch.num_layers, config.parallel) == 1 else "a chunk of a pipeline stage"
        yield (
            f"--recompute-num-layers {config.model.recompute_num_layers} is more than the {layers} layers of {chunk}; "
            f"1 to {layers} would work"
        )


def _context_problems(config: Config, arch: ModelArchitecture) -> Iterator[str]:
    """What keeps a row from being shared out to ranks."""
    tensor, context = config.parallel.tensor_model_parallel_size, config.parallel.context_parallel_size
    heads = [arch.num_attention_heads // tensor] + ([] if arch.latent else [max(1, arch.num_query_groups // tensor)])
    if config.parallel.cp_comm_type == "a2a" and any(number % context for number in heads):
        counts = " query and ".join(map(str, heads)) + (" heads" if arch.latent else " key/value heads")
        yield (
            f"--cp-comm-type a2a deals out a tensor-parallel rank's {counts}, which --context-parallel-size {context} does not "
            f"divide; would work: {_list(_divisors(math.gcd(*heads)))}, or --cp-comm-type all_gather"
        )
    if config.model.attention_backend == "te" and arch.attention_sinks:
        yield (
            f"--attention-backend te knows no sinks at --context-parallel-size {context}; flex would work on a GPU, sdpa anywhere"
        )


def instance_problems(parallel: ParallelConfig, world_size: int) -> Iterator[str]:
    """A number of the distributed optimizer's instances that the ranks of a shard cannot be divided into."""
    instances, pipeline = parallel.num_distributed_optimizer_instances, parallel.pipeline_model_parallel_size
    replicas = world_size // (parallel.tensor_model_parallel_size * pipeline)
    expert_ranks = max(1, parallel.expert_model_parallel_size * expert_tensor_size(parallel))
    expert_replicas = max(1, world_size // (pipeline * expert_ranks))
    if instances > 1 and (replicas % instances or expert_replicas % instances):
        experts = f", or the {expert_replicas} that hold the same experts" if expert_replicas != replicas else ""
        yield (
            f"--num-distributed-optimizer-instances {instances} does not divide the {replicas} ranks that hold the same "
            f"weights{experts}; would work: {_list(_divisors(math.gcd(replicas, expert_replicas)))}"
        )


def tensor_sizes(arch: ModelArchitecture) -> list[int]:
    """Tensor-parallel sizes that the model's heads and MLPs can be cut by, latents left out.

    Above the number of key/value heads, of which it must be a multiple, Megatron-Core's ranks gather queries, keys and values of
    all and take their own.
    """
    sizes = _divisors(math.gcd(arch.num_attention_heads, *arch.mlp_widths))
    return [size for size in sizes if arch.num_query_groups % size == 0 or _goes_above(arch, size)]


def _goes_above(arch: ModelArchitecture, tensor: int) -> bool:
    rows = arch.query_size + 2 * arch.key_size
    return tensor % arch.num_query_groups == 0 and rows % tensor == 0 and not _needs_whole_heads(arch)


def _needs_whole_heads(arch: ModelArchitecture) -> str | None:
    """What of a model's attention wants a key/value head for each tensor-parallel rank, or None."""
    if isinstance(arch, ForeignArchitecture):
        return "a model that another package builds"
    if arch.latent is not None:
        return "latent attention"
    return "a norm over the keys of all heads" if arch.qk_norm_whole else None


def _why_not_above(arch: ModelArchitecture, tensor: int) -> str:
    """Why a size is refused that is a multiple of the key/value heads, where that is another reason than the heads."""
    needs = _needs_whole_heads(arch)
    if needs is None or tensor % arch.num_query_groups or arch.num_query_groups == arch.num_attention_heads:
        return ""
    return f", and {needs} needs a key/value head for each rank"


def latent_problems(arch: ModelArchitecture, tensor: int) -> Iterator[str]:
    """Latents that Megatron-Core's local attention cannot cut."""
    latents = (arch.latent.q_lora_rank or 0, arch.latent.key_value_down_size) if arch.latent else ()
    odd = [str(size) for size in latents if size % tensor]
    if odd:
        works = [size for size in tensor_sizes(arch) if not any(latent % size for latent in latents)]
        yield (
            f"--tensor-model-parallel-size {tensor} does not divide the model's latents of {' and '.join(odd)} channels, which "
            f"Megatron-Core's attention wants; would work: {_list(works)}"
        )


def _device_problems(config: Config) -> Iterator[str]:
    local_ranks, num_gpus = read_launch().local_world_size, torch.cuda.device_count()
    if torch.cuda.is_available():
        if local_ranks > num_gpus:
            yield f"torchrun started {local_ranks} ranks on this machine, which has {num_gpus} GPUs; up to {num_gpus} would work"
        if config.parallel.distributed_backend == "gloo":
            yield "--distributed-backend gloo is for machines without CUDA; leave it out, or use nccl"
        return
    if config.model.attention_backend == "flex":
        yield "--attention-backend flex needs CUDA (FlexAttention has no backward pass without); sdpa would work"
    if config.parallel.distributed_backend == "nccl":
        yield "--distributed-backend nccl needs CUDA; gloo would work"
    if config.profiling.record_memory_history:
        yield "--record-memory-history needs CUDA, whose allocator keeps it; leave it out"


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
