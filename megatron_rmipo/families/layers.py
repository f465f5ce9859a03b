"""Layers that differ in their attention, as Hugging Face configs list them."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_rmipo.families.architecture import LayerKind
from megatron_rmipo.families.fields import Fields

FULL, SLIDING = "full_attention", "sliding_attention"


def every(fields: Fields, period: int) -> list[str]:
    """Types of layers of which each ``period``-th sees everything."""
    return [SLIDING if number % period else FULL for number in range(1, fields.count("num_hidden_layers") + 1)]


def read_layer_kinds(
    fields: Fields, default: Iterable[str], *, full_rope: int | None = 0, sliding_rope: int | None = 0
) -> tuple[LayerKind, ...]:
    """What the attention of each layer does, by ``layer_types`` and ``sliding_window``.

    Args:
        fields: the config.
        default: the type of each layer where the config lists none, as transformers assumes it.
        full_rope, sliding_rope: which of the model's ropes turns queries and keys in layers of a type.

    Returns:
        Empty where no layer differs from what :class:`LayerKind` says of one.

    Raises:
        ConversionError: a list that is not one of known types, one a layer, or windows without a size.
    """
    num_layers, listed, window = fields.count("num_hidden_layers"), fields.get("layer_types"), fields.get("sliding_window")
    types = list(default) if listed is None else listed
    if not isinstance(types, list) or len(types) != num_layers:
        raise fields.error("layer_types", f"must list a type for each of {num_layers} layers, found {types!r:.100}")
    unknown = next((name for name in types if name not in (FULL, SLIDING)), None)
    if unknown is not None:
        raise fields.error("layer_types", f"has {unknown!r}; supported are {FULL!r}, {SLIDING!r}")
    if SLIDING in types:
        window = fields.count("sliding_window")
    kinds = tuple(LayerKind(window, sliding_rope) if name == SLIDING else LayerKind(rope=full_rope) for name in types)
    return () if set(kinds) == {LayerKind()} else kinds


def has_windows(fields: Fields) -> bool:
    """Whether a config that has a switch of its own for windows asks for them."""
    return fields.flag("use_sliding_window") and fields.get("sliding_window") is not None
