"""Which weights of a model get a low-rank adapter, and which modules are trained whole beside it, by the names that people give.

A name is Megatron's of a kind of linear layer (``linear_qkv``), or the end of a Hugging Face module's name as PEFT takes it:
``q_proj`` and ``layers.3.self_attn.q_proj`` both end ``model.layers.3.self_attn.q_proj``, ``proj`` does not.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Layout, Place, Rule
from megatron_rmipo.families.foreign import ForeignArchitecture
from megatron_rmipo.families.tensors import rules_of, source_shapes, tensors_of

# Every matrix of attention and MLP.
ALL_LINEAR = "all-linear"
_SEVERAL_SOURCES = (Layout.QKV, Layout.GATE_UP, Layout.GATE_UP_IN_TURNS)
_NOT_LINEAR = (Layout.VOCABULARY, Layout.EXPERTS, Layout.GATE)


class Targets(Protocol):
    """What is asked for, as the flags have it."""

    @property
    def lora_target_modules(self) -> Sequence[str] | None:
        """Names of modules; None: all linear layers."""

    @property
    def lora_target_regex(self) -> str | None:
        """What the whole name of a module has to match besides, if anything."""

    @property
    def lora_modules_to_save(self) -> Sequence[str] | None:
        """Names of modules that are trained whole."""


def targeted(arch: ModelArchitecture, targets: Targets) -> Iterator[tuple[Rule, Place, tuple[int, ...]]]:
    """The Megatron weights that get an adapter, in the order of a checkpoint.

    Args:
        arch: the model, of one of the families.
        targets: the flags.

    Yields:
        The rule of a weight, where it stands, and the numbers of its sources that have an adapter, ascending. Experts of a layer
        all have one, or none; of an expert's gate and up either both, which share their A, or none.

    Raises:
        ConfigError: a name or the regex matches nothing, or what can have no adapter.
    """
    sources = {(rule, layer): sources for rule, layer, sources in layer_targets(arch, targets)}
    for rule, place in tensors_of(arch):
        if place.layer is not None and (rule, place.layer) in sources:
            yield rule, place, sources[rule, place.layer]


def layer_targets(arch: ModelArchitecture, targets: Targets) -> tuple[tuple[Rule, int, tuple[int, ...]], ...]:
    """As :func:`targeted`, but with the layer's number alone: the experts of a layer are named once."""
    names = (ALL_LINEAR,) if targets.lora_target_modules is None else tuple(targets.lora_target_modules)
    return _layer_targets(arch, names, targets.lora_target_regex)


def modules_to_save(arch: ModelArchitecture, targets: Targets) -> tuple[tuple[Rule, Place], ...]:
    """The Megatron weights that are trained whole beside an adapter, in the order of a checkpoint.

    PEFT takes any end of a name for a match, ``norm`` for ``input_layernorm`` too; here it has to begin at a dot.

    Args:
        arch: the model, of one of the families.
        targets: the flags.

    Raises:
        ConfigError: a name matches nothing, or a module that is not one weight of its own, has an adapter, or is tied.
    """
    names = tuple(targets.lora_modules_to_save or ())
    return _modules_to_save(arch, names, layer_targets(arch, targets)) if names else ()


@functools.lru_cache(maxsize=64)
def _modules_to_save(
    arch: ModelArchitecture, names: tuple[str, ...], adapted: tuple[tuple[Rule, int, tuple[int, ...]], ...]
) -> tuple[tuple[Rule, Place], ...]:
    with_adapter = {(rule, layer) for rule, layer, _ in adapted}
    tensors = [(rule, place, _modules(rule, place)) for rule, place in tensors_of(arch) if not rule.per_expert]
    for name in names:
        found = [(rule, place) for rule, place, modules in tensors if any(_ends(module, name) for module in modules)]
        _check_saved(arch, name, found, with_adapter)
    return tuple(
        (rule, place) for rule, place, modules in tensors if any(_ends(module, name) for module in modules for name in names)
    )


def _check_saved(
    arch: ModelArchitecture, name: str, found: list[tuple[Rule, Place]], with_adapter: set[tuple[Rule, int]]
) -> None:
    flag = f"--lora-modules-to-save {name}"
    if arch.tied_embeddings and name.rpartition(".")[2] in ("embed_tokens", "lm_head"):
        raise ConfigError(
            f"{flag}: the output layer of this model is its embedding, and a copy of one would part them. Leave it out."
        )
    there = f"There are: {', '.join(_alone(arch))}."
    if not found:
        raise ConfigError(f"{flag} names no module of a {arch.family} model that can be trained whole. {there}")
    for rule, place in found:
        module = _modules(rule, place)[0]
        if not _stands_alone(rule, arch):
            raise ConfigError(
                f"{flag}: {module} is not one weight of its own. Give it an adapter (--lora-target-modules), or leave it out. "
                f"{there}"
            )
        if place.layer is not None and (rule, place.layer) in with_adapter:
            raise ConfigError(f"{flag}: {module} has an adapter. Leave it out, here or of --lora-target-modules.")


def _alone(arch: ModelArchitecture) -> list[str]:
    """Last names of the modules that are one weight of their own, but for a tied embedding."""
    rules = [rule for rule in rules_of(arch) if _stands_alone(rule, arch)]
    rules = [rule for rule in rules if rule.layout is not Layout.VOCABULARY or not arch.tied_embeddings]
    return [*dict.fromkeys(_module(rule.sources[0], Place(0)).rpartition(".")[2] for rule in rules)]


def _stands_alone(rule: Rule, arch: ModelArchitecture) -> bool:
    """Whether it is the whole of one Hugging Face module."""
    module = rule.sources[0].removesuffix(".weight") + "."
    inside = {source for one in rules_of(arch) for source in one.sources if source.startswith(module)}
    return inside == {*rule.sources} and not rule.per_expert and rule.layout not in _SEVERAL_SOURCES


@functools.lru_cache(maxsize=64)
def _layer_targets(
    arch: ModelArchitecture, names: tuple[str, ...], regex: str | None
) -> tuple[tuple[Rule, int, tuple[int, ...]], ...]:
    _check_family(arch)
    matches_regex = _regex_matcher(regex)
    linear = [rule for rule in rules_of(arch) if is_linear(rule, arch)]
    for name in names:
        _check_name(arch, name, linear)
    found = []
    for layer in range(arch.num_layers):
        for rule in linear:
            if arch.has(rule.only_with, layer):
                by_name = _sources(rule, arch, layer, functools.partial(_is_named, rule, names))
                sources = tuple(source for source in by_name if source in _sources(rule, arch, layer, matches_regex))
                if sources:
                    found.append((rule, layer, sources))
    if not found:
        raise ConfigError(
            f"--lora-target-regex {regex!r} matches the whole name of none of the modules that --lora-target-modules names; "
            f"one of them is {_modules(linear[0], Place(arch.num_layers - 1, 0))[0]}"
        )
    stacked = next((rule for rule, _, _ in found if rule.is_stacked), None)
    if stacked is not None:
        raise ConfigError(
            f"LoRA: {_modules(stacked, Place(0))[0]} of a {arch.family} model is one tensor of all experts, which no adapter is "
            "built for. Name modules of attention alone: --lora-target-modules q_proj k_proj v_proj o_proj"
        )
    return tuple(found)


def _check_family(arch: ModelArchitecture) -> None:
    if isinstance(arch, ForeignArchitecture):
        raise ConfigError(
            "LoRA resolves names of modules by the rules of a model's family, and this model is of none here. "
            "Train it whole, or use the adapters of the package that builds it."
        )


def _check_name(arch: ModelArchitecture, name: str, linear: Sequence[Rule]) -> None:
    """That a name means some linear layer of the model, and nothing that can have no adapter."""
    there = [rule for rule, place in tensors_of(arch) if _matches_any(rule, place, name)]
    if any(rule in linear for rule in there):
        return
    short = [*dict.fromkeys(_short_name(rule) for rule in linear)]
    last = [*dict.fromkeys(module.rpartition(".")[2] for rule in linear for module in _modules(rule, Place(0, 0)))]
    known = f"There are: {', '.join([ALL_LINEAR, *short, *last])}."
    if there:
        raise ConfigError(
            f"--lora-target-modules {name}: {there[0].megatron.rpartition('.')[0]} can have no adapter. {known} "
            "--lora-modules-to-save trains modules of one weight whole."
        )
    raise ConfigError(f"--lora-target-modules {name} matches no module of a {arch.family} model. {known}")


def _matches_any(rule: Rule, place: Place, name: str) -> bool:
    return any(_is_named(rule, (name,), module) for module in _modules(rule, place))


def _is_named(rule: Rule, names: Sequence[str], module: str) -> bool:
    return any(name in (ALL_LINEAR, _short_name(rule)) or _ends(module, name) for name in names)


def _sources(rule: Rule, arch: ModelArchitecture, layer: int, matches: Callable[[str], bool]) -> tuple[int, ...]:
    """Numbers of a rule's sources in a layer whose modules match."""
    everything = tuple(range(len(rule.sources)))
    if not rule.per_expert or rule.is_stacked:
        return tuple(source for source in everything if matches(_module(rule.sources[source], Place(layer))))
    if rule.joined is not None and matches(_module(rule.joined, Place(layer))):
        return everything
    assert arch.experts is not None
    named = {
        module: matches(module)
        for expert in range(arch.experts.num_experts)
        for module in (_module(source, Place(layer, expert)) for source in rule.sources)
    }
    if any(named.values()) and not all(named.values()):
        without = next(module for module, is_named in named.items() if not is_named)
        raise ConfigError(
            f"--lora-target-modules and --lora-target-regex name a part of layer {layer}'s experts, not {without}. Experts of a "
            "layer have an adapter all or none, gate and up of an expert together: name both, or neither, of all of them."
        )
    return everything if all(named.values()) else ()


def _regex_matcher(regex: str | None) -> Callable[[str], bool]:
    try:
        pattern = re.compile(".*" if regex is None else regex)
    except re.error as error:
        raise ConfigError(f"--lora-target-regex {regex!r} is no regular expression: {error}") from None
    return lambda module: pattern.fullmatch(module) is not None


def is_linear(rule: Rule, arch: ModelArchitecture) -> bool:
    """Whether it is a matrix of attention or of an MLP; no router, table of the vocabulary, or gate of shared experts."""
    return rule.per_layer and rule.layout not in _NOT_LINEAR and not rule.is_bias and len(source_shapes(rule, arch)[0]) == 2


def _short_name(rule: Rule) -> str:
    """Megatron's name of the kind of layer that a weight belongs to."""
    return rule.megatron.split(".")[-2]


def _modules(rule: Rule, place: Place) -> tuple[str, ...]:
    """Hugging Face modules that a weight may belong to: those of its sources, and what holds those of all experts together."""
    joined = () if rule.joined is None else (rule.joined,)
    return tuple(_module(name, place) for name in (*rule.sources, *joined))


def _module(tensor: str, place: Place) -> str:
    return tensor.format(layer=place.layer, expert=place.expert).removesuffix(".weight").removesuffix(".bias")


def _ends(module: str, name: str) -> bool:
    """Whether a name means a module, as PEFT takes it."""
    return module == name or module.endswith("." + name)
