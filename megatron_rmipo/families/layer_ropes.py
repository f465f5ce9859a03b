"""Models whose full and sliding layers turn queries and keys differently."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_rmipo.families.architecture import Rope
from megatron_rmipo.families.fields import Fields
from megatron_rmipo.families.layers import FULL, SLIDING, every, read_layer_kinds
from megatron_rmipo.families.rope import rope_of


def read_layers(fields: Fields, period: int, sliding_base: str) -> Mapping[str, object]:
    """Kinds of layers with the ropes of each, as fields of the architecture.

    transformers 5 keeps the ropes of both types in ``rope_parameters``; before, ``rope_scaling`` was that of full layers alone.

    Args:
        fields: the config.
        period: of the layers that see everything, where the config does not list types.
        sliding_base: the field that has the theta of sliding layers; that of full ones is ``rope_theta``.

    Raises:
        ConversionError: a value that is not supported, with its field.
    """
    base, by_type = fields.number(sliding_base), fields.mapping("rope_parameters")
    if fields.get("rope_parameters"):
        full = rope_of(by_type.mapping(FULL), fields)
        sliding = rope_of(by_type.mapping(SLIDING, {"rope_theta": base}), fields)
        for name in by_type.unread(()):
            raise by_type.error(name, f"stands where ropes are told by type of layer, {FULL!r} and {SLIDING!r}")
    else:
        full, sliding = rope_of(fields.mapping("rope_scaling"), fields), Rope(base)
    ropes = (full,) if full == sliding else (full, sliding)
    kinds = read_layer_kinds(fields, every(fields, period), sliding_rope=len(ropes) - 1)
    return {"ropes": ropes, "layer_kinds": kinds}
