"""Flags of experts that a model or a machine cannot run on: a line each, with what would work."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Iterator

import torch

from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.schema import Config, ExpertsConfig, ModelConfig
from megatron_rmipo.config.unknown_flags import flag_of
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.model.transformer_engine import NO_TRANSFORMER_ENGINE, transformer_engine_available


def expert_kernel_problems(experts: ExpertsConfig, model: ModelConfig) -> Iterator[str]:
    """Faults of the flags of experts that need a GPU, or what is installed for it."""
    if experts.moe_token_dispatcher_type == "flex":
        if not torch.cuda.is_available():
            yield "--moe-token-dispatcher-type flex needs CUDA, whose kernels it is; alltoall would work"
        elif importlib.util.find_spec("deep_ep") is None:
            yield (
                "--moe-token-dispatcher-type flex needs the package deep_ep (github.com/deepseek-ai/DeepEP), which is not "
                "installed; alltoall would work"
            )
    if experts.moe_grouped_gemm and model.transformer_impl == "local":
        yield "--moe-grouped-gemm needs Transformer Engine's layers; leave --transformer-impl local out"
    if not transformer_engine_available():
        for name in ("moe_grouped_gemm", "moe_permute_fusion"):
            if getattr(experts, name):
                yield f"{flag_of(name)}: {NO_TRANSFORMER_ENGINE}"


def expert_layout_problems(config: Config, arch: ModelArchitecture, world_size: int) -> Iterator[str]:
    """What of the layout of experts does not fit the model, or the number of ranks."""
    if arch.experts is None:
        yield from _without_experts(config)
        return
    parallel, experts = config.parallel, arch.experts
    tensor, size, shards = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size, expert_tensor_size(parallel)
    if min(tensor, size, shards) < 1:
        return
    if experts.num_experts % size:
        yield (
            f"--expert-model-parallel-size {size} does not divide the model's {experts.num_experts} experts; would work: "
            f"{_divisors(experts.num_experts)}"
        )
    if experts.ffn_hidden_size % shards:
        named = "unset" if parallel.expert_tensor_parallel_size is None else str(shards)
        yield (
            f"--expert-tensor-parallel-size {named} cuts an expert's {experts.ffn_hidden_size} channels into {shards}; would "
            f"work: {_divisors(experts.ffn_hidden_size)}"
        )
    if config.lora.lora_experts == "shared" and shards not in (1, tensor):
        yield (
            f"--lora-experts shared: the one adapter of all experts cannot be cut over {shards} ranks of an expert and {tensor} "
            f"of other layers; would work: --expert-tensor-parallel-size {' or '.join(map(str, sorted({1, tensor})))}"
        )
    ranks, pipeline = size * shards, parallel.pipeline_model_parallel_size
    replica = tensor * parallel.context_parallel_size
    if pipeline >= 1 and replica >= 1 and world_size % (replica * pipeline) == 0 and (world_size // pipeline) % ranks:
        each = world_size // pipeline
        yield (
            f"experts are spread over EP {size} x expert TP {shards}, {ranks} ranks, which does not divide the {each} ranks "
            f"(TP x CP x DP) of a pipeline stage; start a multiple of {math.lcm(replica, ranks) * pipeline} ranks, or choose "
            f"EP x expert TP among {_divisors(each)}"
        )
    if tensor > 1 and not parallel.sequence_parallel:
        yield (
            f"a model with experts at --tensor-model-parallel-size {tensor} needs --sequence-parallel, without which every "
            "tensor-parallel rank would send the same tokens to them"
        )
    if config.model.recompute_method == "block":
        yield (
            "--recompute-method block: Megatron's layers that are not recomputed do not tell a router which tokens count; "
            "uniform would work"
        )
    if config.experts.moe_router_bias_update_rate and not experts.score_bias:
        yield "--moe-router-bias-update-rate: this model's experts have no score biases; leave it out"


def experts_cross_replicas(parallel: ParallelConfig) -> bool:
    """Whether ranks of different model replicas (data-parallel ranks) meet in every layer of experts."""
    replica = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    return bool(replica % (parallel.expert_model_parallel_size * expert_tensor_size(parallel)))


def expert_tensor_size(parallel: ParallelConfig) -> int:
    """Ranks that share each expert."""
    given = parallel.expert_tensor_parallel_size
    return parallel.tensor_model_parallel_size if given is None else given


def _without_experts(config: Config) -> Iterator[str]:
    given = [flag_of("expert_model_parallel_size")] if config.parallel.expert_model_parallel_size > 1 else []
    given += [flag_of("expert_tensor_parallel_size")] if config.parallel.expert_tensor_parallel_size is not None else []
    defaults = ExpertsConfig()
    names = [field.name for field in dataclasses.fields(ExpertsConfig)]
    given += [flag_of(name) for name in names if getattr(config.experts, name) != getattr(defaults, name)]
    given += [flag_of("log_expert_load")] if config.logging.log_expert_load else []
    if given:
        yield f"{', '.join(given)}: this model has no experts; leave {'it' if len(given) == 1 else 'them'} out"


def _divisors(number: int) -> str:
    return ", ".join(str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)
