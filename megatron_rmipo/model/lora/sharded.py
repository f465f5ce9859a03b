"""An adapter's factors as Megatron's distributed checkpoints take them: stretches of rows of the whole, at any layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.nn import Module

from megatron_rmipo.model.lora.held import HeldFactor, held_of
from megatron_rmipo.model.lora.low_rank import LowRank
from megatron_rmipo.model.named_tensors import ADAPTER, REFERENCE_ADAPTER
from megatron_rmipo.model.packed_model import Replacement
from megatron_rmipo.runtime.groups import ProcessGroups

# Place along a dimension that stands before the factor's own, and its size: of a layer among all, of an expert among its layer's.
Stacked = tuple[int, int]


def sharded_factor(held: HeldFactor, key: str, stacked: Sequence[Stacked], groups: ProcessGroups) -> ShardedTensorFactory:
    """What this rank holds of a factor.

    Args:
        held: the factor.
        key: what the checkpoint calls it.
        stacked: dimensions before its own.
        groups: the process groups of this rank.
    """
    group, replicas = (groups.expert_tp, groups.expert_dp) if held.in_expert else (groups.tp, groups.dp_cp)
    replica = (0, 0 if held.is_cut else group.rank(), replicas.rank())
    shape = held.parameter.shape
    build = partial(_build, held, tuple(stacked))
    return ShardedTensorFactory(key, held.parameter, build, partial(_merge, shape), replica)


class ShardedAdapter(Replacement):
    """A linear layer's ``sharded_state_dict``, which takes what it finds in its children for whole on every rank.

    Args:
        layer: with an adapter.
        adapter: its trained one.
        groups: the process groups of this rank.
    """

    outlives_attach = True

    def __init__(self, layer: Module, adapter: LowRank, groups: ProcessGroups) -> None:
        super().__init__(layer, "sharded_state_dict")
        self.adapter, self.groups = adapter, groups

    def __call__(
        self, prefix: str = "", sharded_offsets: Sequence[tuple[int, int, int]] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As Megatron's, with the factors as what they are; other adapters are left out."""
        found: Mapping[str, Any] = self.behind(prefix, sharded_offsets, metadata)
        ours = (f"{prefix}{ADAPTER}.", f"{prefix}{REFERENCE_ADAPTER}.")
        stacked = [(place, size) for _, place, size in sharded_offsets]
        factors = held_of(self.adapter, f"{prefix}{ADAPTER}")
        return {
            **{name: item for name, item in found.items() if not name.startswith(ours)},
            **{held.full_name: sharded_factor(held, held.full_name, stacked, self.groups) for held in factors},
        }


def _build(
    held: HeldFactor, stacked: tuple[Stacked, ...], key: str, tensor: Tensor, replica: Any, flattened_range: slice | None
) -> dict[str, ShardedTensor]:
    assert flattened_range is None
    places, sizes = [place for place, _ in stacked], [size for _, size in stacked]
    pieces, first = {}, 0
    for number, (offset, extent) in enumerate(held.boxes):
        data = tensor[first : first + extent[0]]
        first += extent[0]
        local = (*(1 for _ in stacked), *extent)
        where, whole = (*places, *offset), (*sizes, *held.shape)
        pieces[str(number)] = ShardedTensor(key, data.view(local), tensor.dtype, local, whole, where, None, replica)
    return pieces


def _merge(shape: torch.Size, pieces: Mapping[str, Tensor]) -> Tensor:
    in_order = [pieces[name].flatten() for name in sorted(pieces, key=int)]
    return torch.cat(in_order).view(shape)
