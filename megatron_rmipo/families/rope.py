"""Rotary embeddings as Hugging Face configs describe them.

transformers 5 keeps theta and scaling together in ``rope_parameters``; before, ``rope_theta`` and ``rope_scaling`` stood apart.
Source of the formulas: ``modeling_rope_utils`` of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from megatron_rmipo.families.architecture import LinearScaling, Llama3Scaling, LongRopeScaling, Rope, YarnScaling
from megatron_rmipo.families.fields import Fields

# What transformers passes over where the type at hand does not use it.
_OF_OTHER_TYPES = (
    *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    *("truncate", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor", "max_position_embeddings", "finetuned"),
    *("rope_theta", "rope_type", "type"),
)


def read_rope(fields: Fields) -> Rope:
    """The rotary embeddings of a model that has one kind of them, and turns all channels of a head.

    Raises:
        ConversionError: a value that is not supported, with its field.
    """
    return rope_of(rope_mapping(fields), fields)


def read_partial_rope(fields: Fields, renamed: Mapping[str, str] | None = None) -> dict[str, object]:
    """The rotary embeddings of a model that may turn a part of the channels of a head, as fields of the architecture.

    Args:
        fields: the config; without ``head_dim`` the heads share its hidden size.
        renamed: other names that the family has for types.

    Raises:
        ConversionError: a value that is not supported, with its field.
    """
    rope = rope_mapping(fields)
    holder = fields if rope.get("partial_rotary_factor") is None else rope
    read: dict[str, object] = {"ropes": (rope_of(rope, fields, renamed),)}
    if holder.get("partial_rotary_factor") not in (None, 1.0):
        head_size = fields.get("head_dim") or fields.count("hidden_size") // fields.count("num_attention_heads")
        part = holder.number("partial_rotary_factor")
        channels = int(head_size * part)
        if part > 1 or channels < 2 or channels % 2:
            what = f"is {part:g}: of {head_size} channels {channels} would be turned, which are not pairs"
            raise holder.error("partial_rotary_factor", what)
        read["rotary_channels"] = channels
    return read


def rope_mapping(fields: Fields) -> Fields:
    """The mapping of a config that describes its rotary embeddings, in either spelling; empty where there is none."""
    return fields.mapping("rope_scaling" if fields.get("rope_scaling") else "rope_parameters")


def rope_type(rope: Fields) -> str:
    """The type that a mapping of a config asks for, in either spelling."""
    kind: str = rope.get("rope_type") or rope.get("type") or "default"
    return kind


def rope_of(rope: Fields, config: Fields, renamed: Mapping[str, str] | None = None) -> Rope:
    """The rotary embeddings that a mapping of a config describes.

    Args:
        rope: the mapping; empty for embeddings without scaling.
        config: the config around it, for what the mapping leaves out.
        renamed: other names that the family has for types.

    Raises:
        ConversionError: a value that is not supported, with its field.
    """
    base = (config if rope.get("rope_theta") is None else rope).number("rope_theta")
    kind = rope_type(rope)
    kind = (renamed or {}).get(kind, kind)
    if kind not in _READERS:
        raise rope.error("rope_type", f"asks for rotary scaling {kind!r}; supported are {', '.join(map(repr, _READERS))}")
    found = _READERS[kind](base, rope, config)
    if "partial_rotary_factor" not in rope.read and rope.get("partial_rotary_factor") not in (None, 1.0):
        part = rope.get("partial_rotary_factor")
        raise rope.error("partial_rotary_factor", f"is {part!r}, but rotary embeddings of this family turn whole heads")
    for name, value in rope.unread(_OF_OTHER_TYPES).items():
        raise rope.error(name, f"is {value!r:.60}, which is not built; remove what says nothing about what is computed")
    return found


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """How much larger YaRN makes queries and keys of a context that is ``factor`` times longer."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def latent_score_factor(fields: Fields) -> float:
    """What latent attention (DeepSeek) multiplies its scores by beside ``1 / sqrt(D)``, for YaRN's ``mscale_all_dim``.

    Args:
        fields: the whole config.
    """
    rope = rope_mapping(fields)
    if rope_type(rope) == "default" or not rope.get("mscale_all_dim"):
        return 1.0
    return yarn_magnitude(rope.number("factor"), rope.number("mscale_all_dim")) ** 2


def _default(base: float, rope: Fields, config: Fields) -> Rope:
    return Rope(base)


def _linear(base: float, rope: Fields, config: Fields) -> Rope:
    return Rope(base, LinearScaling(rope.number("factor")))


def _dynamic(base: float, rope: Fields, config: Fields) -> Rope:
    # The base grows with a sequence that is longer than the context, all of it.
    rope.number("factor")
    return Rope(base, longest_sequence=config.count("max_position_embeddings"))


def _llama3(base: float, rope: Fields, config: Fields) -> Rope:
    factor, low, high = (rope.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    return Rope(base, Llama3Scaling(factor, low, high, _original_context(rope, config)))


def _yarn(base: float, rope: Fields, config: Fields) -> Rope:
    context = _original_context(rope, config)
    factor = _factor(rope, config, context)
    weight, weight_of_all = (_number_or(rope, name, 0.0) for name in ("mscale", "mscale_all_dim"))
    magnitude = yarn_magnitude(factor)
    if weight and weight_of_all:
        magnitude = yarn_magnitude(factor, weight) / yarn_magnitude(factor, weight_of_all)
    truncate = rope.flag("truncate") if rope.get("truncate") is not None else True
    scaling = YarnScaling(factor, context, _number_or(rope, "beta_fast", 32.0), _number_or(rope, "beta_slow", 1.0), truncate)
    return Rope(base, scaling, _attention_factor(rope, magnitude))


def _longrope(base: float, rope: Fields, config: Fields) -> Rope:
    context = _original_context(rope, config)
    factor = _factor(rope, config, context)
    if context < 2:
        raise config.error("original_max_position_embeddings", f"is {context}; a context of at least 2 tokens can be stretched")
    magnitude = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
    # Longer sequences are turned by the long factors, all of them.
    rope.numbers("long_factor")
    scaling = LongRopeScaling(rope.numbers("short_factor"))
    return Rope(base, scaling, _attention_factor(rope, magnitude), longest_sequence=context)


_READERS: Mapping[str, Callable[[float, Fields, Fields], Rope]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def _original_context(rope: Fields, config: Fields) -> int:
    """The context before scaling, where transformers looks for it: in the config, in the mapping; else it is the context."""
    name = "original_max_position_embeddings"
    if config.get(name) is not None:
        return config.count(name)
    return rope.count(name) if rope.get(name) is not None else config.count("max_position_embeddings")


def _factor(rope: Fields, config: Fields, original_context: int) -> float:
    if rope.get("factor") is not None:
        return rope.number("factor")
    return config.count("max_position_embeddings") / original_context


def _attention_factor(rope: Fields, default: float) -> float:
    return rope.number("attention_factor") if rope.get("attention_factor") is not None else default


def _number_or(fields: Fields, name: str, default: float) -> float:
    """A positive number; ``default`` where there is none, or zero."""
    return fields.number(name) if fields.get(name) else default
