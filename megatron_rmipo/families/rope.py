"""Rotary embeddings as Hugging Face configs describe them."""

from __future__ import annotations

from megatron_rmipo.families.architecture import Rope, RopeScaling
from megatron_rmipo.families.fields import Fields

_TYPES = ("default", "llama3")


def read_rope(fields: Fields) -> Rope:
    """The rotary embeddings of a model that has one kind of them.

    transformers 5 keeps theta and scaling together in ``rope_parameters``; before, ``rope_theta`` and ``rope_scaling`` stood
    apart.

    Raises:
        ConversionError: a value that is not supported, with its field.
    """
    rope = fields.mapping("rope_parameters" if fields.get("rope_parameters") else "rope_scaling")
    return rope_of(rope, fields if rope.get("rope_theta") is None else rope)


def rope_of(rope: Fields, theta_holder: Fields) -> Rope:
    """The rotary embeddings that a mapping of a config describes.

    Args:
        rope: the mapping; empty for embeddings without scaling.
        theta_holder: where ``rope_theta`` stands: there, or in the config around it.

    Raises:
        ConversionError: a value that is not supported, with its field.
    """
    base = theta_holder.number("rope_theta")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _TYPES:
        raise rope.error("rope_type", f"asks for rotary scaling {kind!r}; supported are {', '.join(map(repr, _TYPES))}")
    if kind == "default":
        return Rope(base)
    return Rope(
        base,
        RopeScaling(
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_position_embeddings=rope.count("original_max_position_embeddings"),
        ),
    )
