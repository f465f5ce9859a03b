"""The tensors of adapters in a checkpoint: whole factors of Hugging Face's projections, each rank its part, at any layout."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_rmipo.model.lora.held import HeldFactor, held_factors
from megatron_rmipo.runtime.groups import ProcessGroups


def adapter_state(chunk: Any, groups: ProcessGroups, metadata: dict[str, Any]) -> dict[str, Any]:
    """The ``sharded_state_dict`` of what is trained of an adapted chunk: its adapter, and what is trained whole beside it.

    Args:
        chunk: not wrapped.
        groups: the process groups of this rank.
        metadata: as Megatron's ``sharded_state_dict`` takes it.
    """
    trained = {id(parameter) for parameter in chunk.parameters() if parameter.requires_grad}
    own = chunk.sharded_state_dict(metadata=metadata)
    factors = list(held_factors(chunk))
    names = {held.full_name for held in factors}
    state = {name: item for name, item in own.items() if id(getattr(item, "data", None)) in trained and name not in names}
    num_experts = getattr(chunk.config, "num_moe_experts", None) or 0
    return {**state, **{held.full_name: _sharded(held, num_experts, groups) for held in factors}}


def _sharded(held: HeldFactor, num_experts: int, groups: ProcessGroups) -> ShardedTensorFactory:
    """A factor as its stretches, each a box of the whole; that of experts has a dimension of experts before the others."""
    group, replicas = (groups.expert_tp, groups.expert_dp) if held.in_expert else (groups.tp, groups.dp_cp)
    replica = (0, 0 if held.is_cut else group.rank(), replicas.rank())
    shape = held.parameter.shape
    return ShardedTensorFactory(
        held.key,
        held.parameter,
        partial(_build, held, num_experts),
        lambda pieces: torch.cat(
            [pieces[name] for name in sorted(pieces, key=int)], dim=-2 if held.kind != "magnitude" else -1
        ).reshape(shape),
        replica,
    )


def _build(
    held: HeldFactor, num_experts: int, key: str, tensor: Tensor, replica: Any, flattened_range: slice | None
) -> dict[str, ShardedTensor]:
    assert flattened_range is None
    expert = held.projection.expert
    pieces, first = {}, 0
    for number, (offset, sizes) in enumerate(held.boxes):
        data = tensor[first : first + sizes[0]]
        first += sizes[0]
        where, local, whole = offset, sizes, held.shape
        if expert is not None:
            where, local, whole, data = (expert, *where), (1, *local), (num_experts, *whole), data[None]
        pieces[str(number)] = ShardedTensor(key, data, tensor.dtype, local, whole, where, None, replica)
    return pieces
