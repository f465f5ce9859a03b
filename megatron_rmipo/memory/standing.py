"""Bytes that a rank holds whatever the batch: weights, gradients, the optimizer's state."""

from __future__ import annotations

import dataclasses
import functools

from megatron_rmipo.config.pipeline_split import stage_layers
from megatron_rmipo.config.schema import Config
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.tensors import Parameters, layer_parameters
from megatron_rmipo.memory.shares import FP32_BYTES, Shares, data_parallel_size

_DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}


@dataclasses.dataclass(frozen=True)
class StandingMemory:
    """Bytes that a rank holds whatever the batch.

    Attributes:
        weights: in the dtype that is computed in.
        reference: weights of a resident reference, in the same dtype.
        gradients: DDP's buffer.
        master_weights: the optimizer's own weights, where it does not update the others themselves; from when it is built.
        moments: Adam's two; from the first update, or from when a checkpoint is loaded.
        host_optimizer: on the host: what an optimizer there holds, weights, gradients and moments in fp32.
    """

    weights: float
    reference: float = 0.0
    gradients: float = 0.0
    master_weights: float = 0.0
    moments: float = 0.0
    host_optimizer: float = 0.0

    @property
    def optimizer(self) -> float:
        """Bytes of what the optimizer holds on the device."""
        return self.master_weights + self.moments

    @property
    def total(self) -> float:
        """Bytes of all of them, of the device."""
        return self.weights + self.reference + self.gradients + self.optimizer


def standing_memory(
    arch: ModelArchitecture,
    config: Config,
    world_size: int,
    stage: int,
    *,
    trains: bool = True,
    reference: ModelArchitecture | None = None,
) -> StandingMemory:
    """What a rank of a pipeline stage holds.

    Args:
        arch: the model.
        config: the run's flags.
        world_size: all ranks.
        stage: from 0.
        trains: False where there are weights alone, as for scoring.
        reference: the model that stands beside the policy, if one does.
    """
    element = Shares.of(arch, config).element_bytes
    dense, expert = stage_parameters(arch, config, stage)
    weights = (dense + expert) * element
    beside = sum(stage_parameters(reference, config, stage)) * element if reference is not None else 0.0
    if not trains:
        return StandingMemory(weights, beside)
    share = _optimizer_share(arch, config, world_size, dense, expert)
    memory = config.memory
    away = memory.optimizer_offload_fraction * share if memory.optimizer_cpu_offload else 0.0
    master, moments = _state_bytes(config)
    return StandingMemory(
        weights,
        beside,
        gradients=(dense + expert) * _DTYPE_BYTES[memory.main_grads_dtype],
        master_weights=master * (share - away),
        moments=moments * (share - away),
        # Weights, gradients and two moments.
        host_optimizer=4 * FP32_BYTES * away,
    )


def _optimizer_share(arch: ModelArchitecture, config: Config, world_size: int, dense: float, expert: float) -> float:
    """Numbers of the model that this rank's optimizer updates."""
    parallel = config.parallel
    if not parallel.use_distributed_optimizer:
        return dense + expert
    # All that hold the same weights; ranks that hold the same experts are fewer than those that hold the same of the rest.
    shares, instances = Shares.of(arch, config), parallel.num_distributed_optimizer_instances
    replicas = data_parallel_size(config, world_size) * shares.context
    expert_replicas = replicas * shares.tensor / shares.experts
    return instances * (dense / replicas + expert / expert_replicas)


def _state_bytes(config: Config) -> tuple[int, int]:
    """Bytes of a weight of the optimizer's own, and of both moments."""
    memory, half = config.memory, config.model.bf16
    # An optimizer that is partly on the host keeps the other part in fp32, too.
    if not memory.use_precision_aware_optimizer or memory.optimizer_cpu_offload:
        return FP32_BYTES if half else 0, 2 * FP32_BYTES
    # Of fp32 weights beside bf16 ones the sixteen digits alone that those lack.
    moments = _DTYPE_BYTES[memory.exp_avg_dtype] + _DTYPE_BYTES[memory.exp_avg_sq_dtype]
    return 2 if half or memory.main_params_dtype == "fp16" else 0, moments


def stage_parameters(arch: ModelArchitecture, config: Config, stage: int) -> tuple[float, float]:
    """Numbers in a rank's shard of a stage: layers and tables of the vocabulary without experts, experts."""
    shares, kinds = Shares.of(arch, config), _kinds_of_layers(arch)
    layers = [layer for chunk in stage_layers(arch.num_layers, config.parallel)[stage] for layer in chunk]
    sparse = len(arch.expert_layers.intersection(layers))
    dense = expert = 0.0
    for number, one in zip((len(layers) - sparse, sparse), kinds, strict=True):
        if one is not None:
            dense += number * (one.cut / shares.tensor + one.whole)
            expert += number * one.num_experts * one.expert / shares.experts
    last = stage == config.parallel.pipeline_model_parallel_size - 1
    # The first stage embeds, the last one norms and scores; of tied embeddings each has its own copy.
    tables = (stage == 0) + (last and not (stage == 0 and arch.tied_embeddings))
    return dense + tables * shares.vocabulary * arch.hidden_size + last * arch.hidden_size, expert


@functools.lru_cache(maxsize=64)
def _kinds_of_layers(arch: ModelArchitecture) -> tuple[Parameters | None, Parameters | None]:
    """Numbers in the weights of a layer without experts, and of one with them; None where the model has no such layer."""
    firsts = [min(layers, default=None) for layers in (arch.dense_layers, arch.expert_layers)]
    dense, sparse = (None if layer is None else layer_parameters(arch, layer) for layer in firsts)
    return dense, sparse
