"""The tensors of adapters in a run's checkpoint: whole factors of projections, of which each rank has its part."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_rmipo.model.lora.held import held_factors
from megatron_rmipo.model.lora.sharded import sharded_factor
from megatron_rmipo.runtime.groups import ProcessGroups


def adapter_state(chunk: Any, groups: ProcessGroups, metadata: dict[str, Any]) -> dict[str, Any]:
    """The ``sharded_state_dict`` of what is trained of an adapted chunk: its adapter, and what is trained whole beside it.

    Layers have entries of their own, for not all need have an adapter; experts of a layer have one together.

    Args:
        chunk: not wrapped.
        groups: the process groups of this rank.
        metadata: as Megatron's ``sharded_state_dict`` takes it.
    """
    trained = {id(parameter) for parameter in chunk.parameters() if parameter.requires_grad}
    own = chunk.sharded_state_dict(metadata=metadata)
    factors = list(held_factors(chunk))
    names = {held.full_name for held in factors}
    whole = {name: item for name, item in own.items() if id(getattr(item, "data", None)) in trained and name not in names}
    state: dict[str, Any] = {name: _by_layer(item) for name, item in whole.items()}
    num_experts = getattr(chunk.config, "num_moe_experts", None) or 0
    for held in factors:
        expert = held.projection.expert
        stacked = [] if expert is None else [(expert, num_experts)]
        state[held.full_name] = sharded_factor(held, held.key, stacked, groups)
    return state


def _by_layer(item: ShardedTensor) -> ShardedTensor:
    """A tensor that Megatron stacks over all layers as one of its layer."""
    if not item.prepend_axis_num:
        return item
    assert item.prepend_axis_num == 1, item.key
    return dataclasses.replace(
        item,
        key=item.key.replace("layers.", f"layers.{item.global_offset[0]}.", 1),
        global_shape=item.global_shape[1:],
        global_offset=item.global_offset[1:],
        axis_fragmentations=item.axis_fragmentations[1:] if item.axis_fragmentations is not None else None,
        prepend_axis_num=0,
    )
