"""Bytes that a rank holds whatever the batch: weights, gradients, the optimizer's state."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

from megatron_rmipo.config.pipeline_split import stage_layers
from megatron_rmipo.config.schema import Config
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Layout, Rule
from megatron_rmipo.families.registry import FAMILIES
from megatron_rmipo.families.targets import is_linear, modules_to_save
from megatron_rmipo.families.tensors import Parameters, layer_parameters, megatron_shape
from megatron_rmipo.memory.shares import FP32_BYTES, Shares, data_parallel_size
from megatron_rmipo.model.lora.numbers import layer_adapters
from megatron_rmipo.model.lora.quantized import BYTES_EACH

_DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}


class StageNumbers(NamedTuple):
    """Numbers in tensors that a rank of a pipeline stage holds.

    Attributes:
        dense: in those of no expert, tables of the vocabulary among them.
        expert: in those of experts.
    """

    dense: float = 0.0
    expert: float = 0.0


@dataclasses.dataclass(frozen=True)
class StandingMemory:
    """Bytes that a rank holds whatever the batch.

    Attributes:
        weights: in the dtype that is computed in, frozen ones maybe in fewer bits; with adapters, which are in fp32.
        reference: weights of a resident reference, in the same dtype; beside an adapter what the model is without it.
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
    memory, half, element = config.memory, config.model.bf16, Shares.of(arch, config).element_bytes
    adapter, whole = trained_parameters(arch, config, stage)
    weights = sum(stage_parameters(arch, config, stage)) * element + sum(adapter) * FP32_BYTES
    weights -= sum(_linear_parameters(arch, config, stage)) * (element - _frozen_bytes(config, element))
    beside = sum(stage_parameters(reference, config, stage)) * element if reference is not None else 0.0
    if config.lora.is_on:
        # The reference is the model with its adapter off, or with another one of about its size.
        beside += sum(whole) * element + sum(adapter) * FP32_BYTES * (config.lora.reference_adapter is not None)
    if not trains:
        return StandingMemory(weights, beside)
    away = memory.optimizer_offload_fraction if memory.optimizer_cpu_offload else 0.0
    master_weights = moments = updated = 0.0
    for numbers, in_half in ((adapter, False), (whole, half)):
        share = _optimizer_share(arch, config, world_size, numbers)
        master, both = _state_bytes(config, half=in_half)
        updated += share
        master_weights += master * share
        moments += both * share
    return StandingMemory(
        weights,
        beside,
        gradients=sum(adapter) * FP32_BYTES + sum(whole) * _DTYPE_BYTES[memory.main_grads_dtype],
        master_weights=master_weights * (1 - away),
        moments=moments * (1 - away),
        # Weights, gradients and two moments.
        host_optimizer=4 * FP32_BYTES * away * updated,
    )


def _frozen_bytes(config: Config, element: int) -> float:
    """Of a number in the frozen weights of linear layers."""
    kind = config.lora.quantize_base
    return element if kind is None else BYTES_EACH[kind]


def _optimizer_share(arch: ModelArchitecture, config: Config, world_size: int, numbers: StageNumbers) -> float:
    """Of trained numbers of a rank those that its optimizer updates."""
    parallel, (dense, expert) = config.parallel, numbers
    if not parallel.use_distributed_optimizer:
        return dense + expert
    # All that hold the same weights; ranks that hold the same experts are fewer than those that hold the same of the rest.
    shares, instances = Shares.of(arch, config), parallel.num_distributed_optimizer_instances
    replicas = data_parallel_size(config, world_size) * shares.context
    expert_replicas = replicas * shares.tensor / shares.experts
    return instances * (dense / replicas + expert / expert_replicas)


def _state_bytes(config: Config, *, half: bool) -> tuple[int, int]:
    """Bytes of the optimizer's own copy of a weight, which is in bf16 or in fp32, and of both moments."""
    memory = config.memory
    # An optimizer that is partly on the host keeps the other part in fp32, too.
    if not memory.use_precision_aware_optimizer or memory.optimizer_cpu_offload:
        return FP32_BYTES if half else 0, 2 * FP32_BYTES
    # Of fp32 weights beside bf16 ones the sixteen digits alone that those lack.
    moments = _DTYPE_BYTES[memory.exp_avg_dtype] + _DTYPE_BYTES[memory.exp_avg_sq_dtype]
    return 2 if half or memory.main_params_dtype == "fp16" else 0, moments


def stage_parameters(arch: ModelArchitecture, config: Config, stage: int) -> StageNumbers:
    """Numbers in a rank's shard of the weights of a stage, without adapters."""
    shares, layers = Shares.of(arch, config), _layers_of(arch, config, stage)
    last = stage == config.parallel.pipeline_model_parallel_size - 1
    # The first stage embeds, the last one norms and scores; of tied embeddings each has its own copy.
    tables = (stage == 0) + (last and not (stage == 0 and arch.tied_embeddings))
    beside = tables * shares.vocabulary * arch.hidden_size + last * arch.hidden_size
    of_layers = _of_layers(arch, shares, layers, _kinds_of_layers(arch))
    return of_layers._replace(dense=of_layers.dense + beside)


def trained_parameters(arch: ModelArchitecture, config: Config, stage: int) -> tuple[StageNumbers, StageNumbers]:
    """Numbers that a rank of a stage trains: in adapters, which are in fp32, and in weights of the model's dtype."""
    if not config.lora.is_on:
        return StageNumbers(), stage_parameters(arch, config, stage)
    shares, layers = Shares.of(arch, config), _layers_of(arch, config, stage)
    of_layers = layer_adapters(arch, config.lora, shares.tensor)
    cut, whole, expert_cut, expert_whole = (sum(of_layers[layer][kind] for layer in layers) for kind in range(4))
    # Each rank has the whole of what the ranks of an expert do not share.
    expert = expert_cut / shares.experts + expert_whole * shares.expert_tensor / shares.experts
    saved = 0.0
    for rule, place in modules_to_save(arch, config.lora):
        first = rule.megatron == FAMILIES[arch.family].embedding
        last = config.parallel.pipeline_model_parallel_size - 1
        if place.layer in layers if place.layer is not None else stage == (0 if first else last):
            shape = megatron_shape(rule, arch)
            if rule.layout is Layout.VOCABULARY:
                saved += shares.vocabulary * shape[1]
            else:
                saved += math.prod(shape) / (shares.tensor if rule.is_cut else 1)
    return StageNumbers(cut / shares.tensor + whole, expert), StageNumbers(saved)


def _linear_parameters(arch: ModelArchitecture, config: Config, stage: int) -> StageNumbers:
    """Numbers in a rank's shard of the matrices of attention and MLPs of a stage."""
    if config.lora.quantize_base is None:
        return StageNumbers()
    return _of_layers(arch, Shares.of(arch, config), _layers_of(arch, config, stage), _linear_kinds_of_layers(arch))


def _layers_of(arch: ModelArchitecture, config: Config, stage: int) -> list[int]:
    return [layer for chunk in stage_layers(arch.num_layers, config.parallel)[stage] for layer in chunk]


_Kinds = tuple[Parameters | None, Parameters | None]


def _of_layers(arch: ModelArchitecture, shares: Shares, layers: list[int], kinds: _Kinds) -> StageNumbers:
    """Numbers that a rank has of layers without experts and with them, of each of which kind they are so many."""
    sparse = len(arch.expert_layers.intersection(layers))
    dense = expert = 0.0
    for number, one in zip((len(layers) - sparse, sparse), kinds, strict=True):
        if one is not None:
            dense += number * (one.cut / shares.tensor + one.whole)
            expert += number * one.num_experts * one.expert / shares.experts
    return StageNumbers(dense, expert)


@functools.lru_cache(maxsize=64)
def _kinds_of_layers(arch: ModelArchitecture) -> _Kinds:
    """Numbers in the weights of a layer without experts, and of one with them; None where the model has no such layer."""
    return _first_of_kinds(arch, lambda _rule: True)


@functools.lru_cache(maxsize=64)
def _linear_kinds_of_layers(arch: ModelArchitecture) -> _Kinds:
    """The same of the matrices of attention and MLPs alone."""
    return _first_of_kinds(arch, lambda rule: is_linear(rule, arch))


def _first_of_kinds(arch: ModelArchitecture, counts: Callable[[Rule], bool]) -> _Kinds:
    firsts = [min(layers, default=None) for layers in (arch.dense_layers, arch.expert_layers)]
    dense, sparse = (None if layer is None else layer_parameters(arch, layer, counts) for layer in firsts)
    return dense, sparse
