"""The tensors of a model by the rules of its family: which there are, their shapes, and how many numbers they hold."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import NamedTuple

from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Layout, Place, Rule
from megatron_rmipo.families.foreign import ForeignArchitecture
from megatron_rmipo.families.registry import FAMILIES


class Parameters(NamedTuple):
    """Numbers in a layer's weights.

    Attributes:
        cut: in those that tensor parallelism cuts.
        whole: in those that every tensor-parallel rank holds: norms, routers, and biases that are added after a sum.
        expert: in one expert's; which ranks hold it, expert parallelism and expert tensor parallelism say.
        num_experts: how many of those there are; 0 in a dense layer.
    """

    cut: int
    whole: int
    expert: int = 0
    num_experts: int = 0


def rules_of(arch: ModelArchitecture) -> tuple[Rule, ...]:
    """The tensors a checkpoint of this model holds: those of the family's table, the head not where embeddings are tied."""
    family = FAMILIES[arch.family]
    rules = [rule for rule in family.rules if rule.only_with is None or getattr(arch, rule.only_with)]
    return tuple(rule for rule in rules if not (arch.tied_embeddings and rule.megatron == family.head))


def tensors_of(arch: ModelArchitecture) -> list[tuple[Rule, Place]]:
    """Every tensor of the model and where it stands, in the order a checkpoint is written."""
    rules = rules_of(arch)
    first_layer_rule = next(i for i, rule in enumerate(rules) if rule.per_layer)
    before = [rule for rule in rules[:first_layer_rule] if not rule.per_layer]
    after = [rule for rule in rules[first_layer_rule:] if not rule.per_layer]
    tensors = [(rule, Place()) for rule in before]
    for layer in range(arch.num_layers):
        tensors += _tensors_of_layer([rule for rule in rules if rule.per_layer and arch.has(rule.only_with, layer)], arch, layer)
    return tensors + [(rule, Place()) for rule in after]


def _tensors_of_layer(rules: list[Rule], arch: ModelArchitecture, layer: int) -> list[tuple[Rule, Place]]:
    experts = range(arch.experts.num_experts) if arch.experts else ()
    # All of one expert stand together where the first of its rules does, but for what one source holds of all experts.
    of_experts = [rule for rule in rules if rule.per_expert and not rule.is_stacked]
    tensors: list[tuple[Rule, Place]] = []
    for rule in rules:
        if not rule.per_expert:
            tensors.append((rule, Place(layer)))
        elif rule.is_stacked:
            tensors += [(rule, Place(layer, expert)) for expert in experts]
        elif rule is of_experts[0]:
            tensors += [(rule, Place(layer, expert)) for expert in experts for rule in of_experts]
    return tensors


def ffn_channels(rule: Rule, arch: ModelArchitecture) -> int:
    """Channels between the matrices of the MLP that a rule's tensor belongs to: a layer's own, an expert, the shared experts."""
    if arch.experts is not None and rule.per_expert:
        return arch.experts.ffn_hidden_size
    if arch.experts is not None and rule.of_shared_experts:
        return arch.experts.shared_ffn_hidden_size
    return arch.ffn_hidden_size


def stored_tensors(arch: ModelArchitecture) -> dict[str, tuple[Rule, tuple[int, ...]]]:
    """Every Hugging Face tensor of the model by name, in the order a checkpoint is written: its rule and its shape."""
    return {
        name: (rule, shape)
        for rule, place in tensors_of(arch)
        for name, shape in zip(rule.source_names(place), stored_shapes(rule, arch), strict=True)
    }


def stored_shapes(rule: Rule, arch: ModelArchitecture) -> tuple[tuple[int, ...], ...]:
    """Shapes of the Hugging Face tensors of a rule."""
    shapes = source_shapes(rule, arch)
    if not rule.is_stacked:
        return shapes
    assert arch.experts is not None
    return tuple((arch.experts.num_experts, *reversed(shape)) for shape in shapes)


def source_shapes(rule: Rule, arch: ModelArchitecture) -> tuple[tuple[int, ...], ...]:
    """Shapes of the sources of a rule's tensor; those in a tensor of all experts as if each were one of its own."""
    hidden, ffn, query_rows, key_rows = arch.hidden_size, ffn_channels(rule, arch), arch.query_size, arch.key_size
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
        case Layout.EXPERTS:
            assert arch.experts is not None
            return ((arch.experts.num_experts, *inputs),)
        case Layout.GATE:
            return ((1, hidden),)
        case Layout.QUERIES:
            return ((query_rows,),)
        case Layout.KEYS:
            return ((key_rows,),)
        case Layout.HEADS:
            return ((arch.num_attention_heads,),)
        case Layout.VOCABULARY:
            return ((arch.vocab_size, hidden),)
        case Layout.QKV:
            return _joined(rule, (query_rows, *inputs), (key_rows, *inputs), (key_rows, *inputs))
        case Layout.GATE_UP:
            return _joined(rule, (ffn, *inputs), (ffn, *inputs))
        case Layout.GATE_UP_IN_TURNS:
            return ((2 * ffn, *inputs),)
        case Layout.HEAD_COLUMNS:
            return ((hidden, arch.context_size),)
        case Layout.FFN_COLUMNS:
            return ((hidden, ffn),)


def megatron_shape(rule: Rule, arch: ModelArchitecture) -> tuple[int, ...]:
    """Shape of the Megatron tensor of a rule, over all tensor-parallel ranks, without vocabulary padding."""
    shapes = source_shapes(rule, arch)
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def num_parameters(arch: ModelArchitecture) -> int:
    """Numbers in the model's weights, all experts among them, without padding of the vocabulary; of no family here, about."""
    if isinstance(arch, ForeignArchitecture):
        tables = (1 if arch.tied_embeddings else 2) * arch.vocab_size * arch.hidden_size
        return tables + arch.hidden_size + arch.num_layers * sum(layer_parameters(arch, 0))
    return sum(math.prod(megatron_shape(rule, arch)) for rule, _ in tensors_of(arch))


def active_parameters(arch: ModelArchitecture) -> int:
    """Numbers in the weights that a token goes through: of each layer's experts as many as it takes."""
    if arch.experts is None:
        return num_parameters(arch)
    idle = arch.experts.num_experts - arch.experts.per_token
    return num_parameters(arch) - sum(idle * layer_parameters(arch, layer).expert for layer in arch.expert_layers)


def layer_parameters(arch: ModelArchitecture, layer: int, counts: Callable[[Rule], bool] = lambda _rule: True) -> Parameters:
    """Numbers in the weights of ``layer`` (counted from 0), those that ``counts``; of a model of no family here, about."""
    if isinstance(arch, ForeignArchitecture):
        return Parameters(arch.layer_matrices, arch.layer_vectors)
    cut = whole = expert = 0
    for rule in rules_of(arch):
        if not (rule.per_layer and arch.has(rule.only_with, layer) and counts(rule)):
            continue
        count = math.prod(megatron_shape(rule, arch))
        if rule.per_expert:
            expert += count
        elif rule.is_cut:
            cut += count
        else:
            whole += count
    return Parameters(cut, whole, expert, arch.experts.num_experts if arch.experts and expert else 0)


def _joined(rule: Rule, *parts: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The shapes of parts that are a source each, or of the one source that holds them all, one below the other."""
    return parts if len(rule.sources) > 1 else ((sum(part[0] for part in parts), *parts[0][1:]),)
