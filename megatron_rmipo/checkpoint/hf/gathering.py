"""Whole tensors out of the shards that ranks hold, each on the rank that writes it: who holds what, and who sends it to whom.

A tensor is put together within the smallest group that holds it: tensor-parallel shards over their group, those of an expert over
the group that shares it and from there over the ranks with other experts. No shard leaves its model replica or its stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rmipo.checkpoint.hf.shards import join_shards
from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Place, Rule
from megatron_rmipo.families.parameter_names import TensorId
from megatron_rmipo.families.tensors import megatron_shape, tensors_of
from megatron_rmipo.runtime.groups import ProcessGroups


class Seat(NamedTuple):
    """A rank's place in its pipeline stage: among those that hold the same shard, and in its tensor-parallel group."""

    replica: int
    tp: int


class Holder(NamedTuple):
    """Which ranks hold a tensor: the pipeline stage, for an expert's the place in the expert-parallel group; and its dtype."""

    stage: int
    expert_rank: int
    dtype: torch.dtype


def sharing_group(rule: Rule, groups: ProcessGroups) -> dist.ProcessGroup:
    """The ranks that share a tensor of this kind, each with its shard where it is cut."""
    return groups.expert_tp if rule.per_expert else groups.tp


class GatheredTensors:
    """The tensors of a model, whole, each on a rank of the stage that holds it. All ranks make it together.

    Args:
        held: this rank's tensors.
        arch: the model.
        groups: the process groups of this rank.

    Attributes:
        holders: of each tensor.

    Raises:
        ConversionError: no rank holds a tensor of the model.
    """

    def __init__(self, held: Mapping[TensorId, Tensor], arch: ModelArchitecture, groups: ProcessGroups) -> None:
        self._held, self._arch, self._groups = held, arch, groups
        own = {key: Holder(groups.pp_rank, groups.ep.rank(), tensor.dtype) for key, tensor in held.items()}
        self.holders = _first_of(_all_gather(_first_of(_all_gather(own, groups.ep)), groups.pp))
        self._seat = Seat(groups.dp_cp.rank(), groups.tp_rank)
        # Of the ranks that hold one copy of a layer's experts: by place in the expert tensor-parallel and expert-parallel groups.
        self._block: list[list[Seat]] = _all_gather(_all_gather(self._seat, groups.ep), groups.expert_tp)
        keys = [(rule.megatron, place) for rule, place in tensors_of(arch)]
        if missing := [key for key in keys if key not in self.holders]:
            names = ", ".join(f"{name} at {place}" for name, place in missing[:4])
            raise ConversionError(f"No rank's model holds {names}. Build it from the checkpoint's config.json.")

    def helps(self, writer: Seat) -> bool:
        """Whether this rank holds something of what a rank of its stage may have to write."""
        return writer.replica == self._seat.replica or any(writer in seats for seats in self._block)

    def gather(self, rule: Rule, place: Place, writer: Seat) -> Tensor | None:
        """A tensor of this rank's stage, whole, on the rank that is to write it; None elsewhere.

        The ranks that :meth:`helps` is true of call it together, in the same order.
        """
        if rule.per_expert:
            return self._gather_expert(rule, place, writer)
        if writer.replica != self._seat.replica:
            return None
        return _join(self._held[rule.megatron, place], rule, self._groups.tp, writer.tp)

    def _gather_expert(self, rule: Rule, place: Place, writer: Seat) -> Tensor | None:
        seats = next((place for place, seats in enumerate(self._block) if writer in seats), None)
        if seats is None:
            return None
        holder, groups = self.holders[rule.megatron, place], self._groups
        whole, source, target = None, holder.expert_rank, self._block[seats].index(writer)
        if groups.ep.rank() == source:
            whole = _join(self._held[rule.megatron, place], rule, groups.expert_tp, seats)
        if source == target or groups.expert_tp.rank() != seats:
            return whole
        if whole is not None:
            # As bytes, which every backend sends.
            dist.send(whole.contiguous().view(torch.uint8), group=groups.ep, group_dst=target)
            return None
        if groups.ep.rank() != target:
            return None
        received = torch.empty(megatron_shape(rule, self._arch), dtype=holder.dtype, device=_device(groups.ep))
        dist.recv(received.view(torch.uint8), group=groups.ep, group_src=source)
        return received


def _join(shard: Tensor, rule: Rule, group: dist.ProcessGroup, place: int) -> Tensor | None:
    """The whole tensor on the rank at ``place`` of a group that shares it, whose ranks call this together; None elsewhere."""
    if not rule.is_cut:
        return shard if group.rank() == place else None
    own = shard.contiguous().view(torch.uint8)
    parts = [own]
    if group.size() > 1:
        parts = [torch.empty_like(own) for _ in range(group.size())] if group.rank() == place else []
        dist.gather(own, parts or None, group=group, group_dst=place)
    return join_shards([part.view(shard.dtype) for part in parts], rule) if parts else None


def _all_gather(value: Any, group: dist.ProcessGroup) -> list[Any]:
    values = [value] * group.size()
    if group.size() > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def _first_of(parts: list[dict[TensorId, Holder]]) -> dict[TensorId, Holder]:
    return {key: holder for part in reversed(parts) for key, holder in part.items()}


def _device(group: dist.ProcessGroup) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")
