"""The tensors of a model by the rules of its family: which there are, their shapes, and how many numbers they hold."""

from __future__ import annotations

import math
import operator
from typing import NamedTuple

from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Layout, Rule
from megatron_rmipo.families.registry import FAMILIES


class Parameters(NamedTuple):
    """Numbers in a layer's weights.

    Attributes:
        cut: in those that tensor parallelism cuts.
        whole: in those that every tensor-parallel rank holds: norms, and biases that are added after a sum.
    """

    cut: int
    whole: int


def rules_of(arch: ModelArchitecture) -> tuple[Rule, ...]:
    """The tensors a checkpoint of this model holds: those of the family's table, the head not where embeddings are tied."""
    family = FAMILIES[arch.family]
    rules = [rule for rule in family.rules if rule.only_with is None or getattr(arch, rule.only_with)]
    return tuple(rule for rule in rules if not (arch.tied_embeddings and rule.megatron == family.head))


def tensors_of(arch: ModelArchitecture) -> list[tuple[Rule, int | None]]:
    """Every tensor of the model as (rule, layer), layer None outside the layers, in the order a checkpoint is written."""
    rules = rules_of(arch)
    first_layer_rule = next(i for i, rule in enumerate(rules) if rule.per_layer)
    layer_rules = [rule for rule in rules if rule.per_layer]
    before = [rule for rule in rules[:first_layer_rule] if not rule.per_layer]
    after = [rule for rule in rules[first_layer_rule:] if not rule.per_layer]
    tensors: list[tuple[Rule, int | None]] = [(rule, None) for rule in before]
    tensors += [(rule, layer) for layer in range(arch.num_layers) for rule in layer_rules if arch.has(rule.only_with, layer)]
    return tensors + [(rule, None) for rule in after]


def source_shapes(rule: Rule, arch: ModelArchitecture) -> tuple[tuple[int, ...], ...]:
    """Shapes of the Hugging Face tensors of a rule."""
    hidden, ffn, query_rows, key_rows = arch.hidden_size, arch.ffn_hidden_size, arch.query_size, arch.key_size
    inputs = () if rule.is_bias else (hidden,)
    if rule.sizes:
        return (tuple(operator.attrgetter(name)(arch) for name in rule.sizes),)
    match rule.layout:
        case Layout.WHOLE:
            return ((hidden,),)
        case Layout.HEAD_ROWS:
            raise AssertionError(f"{rule.megatron} does not say its sizes")
        case Layout.HEAD:
            return ((arch.kv_channels,),)
        case Layout.VOCABULARY:
            return ((arch.vocab_size, hidden),)
        case Layout.QKV:
            return ((query_rows, *inputs), (key_rows, *inputs), (key_rows, *inputs))
        case Layout.GATE_UP:
            return ((ffn, *inputs), (ffn, *inputs))
        case Layout.HEAD_COLUMNS:
            return ((hidden, arch.context_size),)
        case Layout.FFN_COLUMNS:
            return ((hidden, ffn),)


def megatron_shape(rule: Rule, arch: ModelArchitecture) -> tuple[int, ...]:
    """Shape of the Megatron tensor of a rule, over all tensor-parallel ranks, without vocabulary padding."""
    shapes = source_shapes(rule, arch)
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def num_parameters(arch: ModelArchitecture) -> int:
    """Numbers in the model's weights, without padding of the vocabulary."""
    return sum(math.prod(megatron_shape(rule, arch)) for rule, _ in tensors_of(arch))


def layer_parameters(arch: ModelArchitecture, layer: int) -> Parameters:
    """Numbers in the weights of ``layer`` (counted from 0)."""
    counts = [0, 0]
    for rule in rules_of(arch):
        if rule.per_layer and arch.has(rule.only_with, layer):
            counts[not rule.is_cut] += math.prod(megatron_shape(rule, arch))
    return Parameters(*counts)
