"""How many numbers an adapter has, and how many of them a rank: from the model's sizes and the flags alone."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

from megatron_rmipo.config.flags.lora import LoraConfig
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Layout, Rule
from megatron_rmipo.families.targets import is_linear, layer_targets, modules_to_save
from megatron_rmipo.families.tensors import megatron_shape, num_parameters, source_shapes


class AdapterNumbers(NamedTuple):
    """Numbers in the adapters of a layer, or of several.

    Attributes:
        cut: in those that tensor parallelism cuts.
        whole: in those that every tensor-parallel rank holds, and in those that all experts share.
        expert_cut: in those of all experts, what expert tensor parallelism cuts.
        expert_whole: what it does not.
    """

    cut: int = 0
    whole: int = 0
    expert_cut: int = 0
    expert_whole: int = 0


def layer_adapters(arch: ModelArchitecture, lora: LoraConfig, tensor_parallel_size: int = 1) -> tuple[AdapterNumbers, ...]:
    """Numbers in the adapters of each layer, all experts among them.

    A is ``[rank, columns]`` and B ``[rows, rank]`` of each projection; with DoRA there is a length for each row.

    Args:
        arch: the model.
        lora: the flags, with a rank.
        tensor_parallel_size: where key/value heads cannot be dealt out evenly, every rank holds the whole B of the projections.

    Raises:
        ConfigError: as :func:`megatron_rmipo.families.targets.targeted`.
    """
    assert lora.lora_rank is not None
    is_uneven = arch.num_query_groups % tensor_parallel_size != 0
    targets = layer_targets(arch, lora)
    return _layer_adapters(
        arch, targets, lora.lora_rank, has_lengths=lora.use_dora, shares=lora.lora_experts == "shared", is_uneven=is_uneven
    )


@functools.lru_cache(maxsize=64)
def _layer_adapters(
    arch: ModelArchitecture,
    targets: tuple[tuple[Rule, int, tuple[int, ...]], ...],
    rank: int,
    *,
    has_lengths: bool,
    shares: bool,
    is_uneven: bool,
) -> tuple[AdapterNumbers, ...]:
    found = [[0, 0, 0, 0] for _ in range(arch.num_layers)]
    for rule, layer, sources in targets:
        shapes = source_shapes(rule, arch)
        rows = [shapes[source][0] for source in sources]
        # An expert's gate and up share their A.
        num_inputs = 1 if rule.per_expert else len(rows)
        inputs, outputs = rank * shapes[0][1] * num_inputs, (rank + has_lengths) * sum(rows)
        cut = (inputs if rule.cuts_columns else outputs) if rule.is_cut else 0
        if (rule.layout is Layout.QKV and is_uneven) or (rule.per_expert and shares):
            cut = 0
        of_experts = rule.per_expert and not shares
        copies = arch.experts.num_experts if of_experts and arch.experts else 1
        found[layer][2 * of_experts] += copies * cut
        found[layer][2 * of_experts + 1] += copies * (inputs + outputs - cut)
    return tuple(AdapterNumbers(*numbers) for numbers in found)


class Trained(NamedTuple):
    """A matrix of a layer that takes part in what is trained, and so keeps its input.

    Attributes:
        rule: of it.
        num_parts: so many A are multiplied with its input; 0 where it is trained whole.
    """

    rule: Rule
    num_parts: int


def trained_matrices(arch: ModelArchitecture, lora: LoraConfig) -> tuple[frozenset[Trained], ...]:
    """Of each layer the matrices that have an adapter or are trained whole beside it; the experts' are named once."""
    found: list[set[Trained]] = [set() for _ in range(arch.num_layers)]
    for rule, layer, sources in layer_targets(arch, lora):
        found[layer].add(Trained(rule, 1 if rule.per_expert else len(sources)))
    for rule, place in modules_to_save(arch, lora):
        if place.layer is not None and is_linear(rule, arch):
            found[place.layer].add(Trained(rule, 0))
    return tuple(map(frozenset, found))


def active_adapter_numbers(arch: ModelArchitecture, lora: LoraConfig) -> float:
    """Numbers in A and B that a token is multiplied with, all layers together: of experts those of as many as it goes through."""
    of_layers = layer_adapters(arch, dataclasses.replace(lora, lora_experts="each", use_dora=False))
    share = arch.experts.per_token / arch.experts.num_experts if arch.experts else 0.0
    return sum(one.cut + one.whole + share * (one.expert_cut + one.expert_whole) for one in of_layers)


def num_trained(arch: ModelArchitecture, lora: LoraConfig) -> int:
    """Numbers that a run changes: those of the adapter, and those of modules that are trained whole."""
    saved = sum(math.prod(megatron_shape(rule, arch)) for rule, _ in modules_to_save(arch, lora))
    return sum(map(sum, layer_adapters(arch, lora))) + saved


def describe_trained(arch: ModelArchitecture, lora: LoraConfig) -> str:
    """What is trained, in words: ``adapter of rank 16 over q_proj, v_proj: 6.8 M of 8.03 B numbers are trained (0.085 %)``."""
    number, total = num_trained(arch, lora), num_parameters(arch)
    targets = layer_targets(arch, lora)
    layers = {layer for _, layer, _ in targets}
    over = _last_names((rule, source) for rule, _, sources in targets for source in sources)
    if len(layers) < arch.num_layers:
        over += f" of {len(layers)} of {arch.num_layers} layers"
    if whole := _last_names((rule, 0) for rule, _ in modules_to_save(arch, lora)):
        over += f", and {whole} whole"
    form = "DoRA adapter" if lora.use_dora else "adapter"
    return (
        f"{form} of rank {lora.lora_rank} over {over}: "
        f"{_short(number)} of {_short(total)} numbers are trained ({100 * number / total:.2g} %)"
    )


def _last_names(sources: Iterable[tuple[Rule, int]]) -> str:
    """Last words of Hugging Face names of rules' sources, once each."""
    return ", ".join(dict.fromkeys(rule.sources[number].removesuffix(".weight").rpartition(".")[2] for rule, number in sources))


def _short(number: int) -> str:
    """Three digits, in thousands, millions or billions."""
    for unit, name in ((1e9, " B"), (1e6, " M"), (1e3, " K")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)
