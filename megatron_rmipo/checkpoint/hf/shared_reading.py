"""Which replica of a model shard reads which of its tensors, and how the others come by them: each is read once a shard."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rmipo.families.base import Rule
from megatron_rmipo.families.parameter_names import TensorId
from megatron_rmipo.runtime.agreement import on_each_rank_alone
from megatron_rmipo.runtime.groups import ProcessGroups


class SharedTensor(NamedTuple):
    """A tensor that all ranks of ``group`` hold alike, and the place there of the rank that reads it."""

    key: TensorId
    group: dist.ProcessGroup
    reader: int


def replica_group(rule: Rule, groups: ProcessGroups) -> dist.ProcessGroup:
    """The ranks that hold the same shard of a tensor of this kind."""
    return groups.expert_dp if rule.per_expert else groups.dp_cp


def share_reading(held: Mapping[TensorId, Tensor], rules: Mapping[str, Rule], groups: ProcessGroups) -> list[SharedTensor]:
    """Deal this rank's tensors over the ranks that hold the same, each to the one that has the fewest bytes to read so far.

    No communication: ranks that hold the same come to the same. What all ranks of a stage hold comes before experts, of which
    ranks of one group of the former hold different ones, so that no two ranks wait for each other in two groups.

    Args:
        held: of :func:`megatron_rmipo.checkpoint.hf.weights.local_tensors`.
        rules: of each Megatron tensor, by name.
        groups: the process groups of this rank.
    """
    shared = []
    for of_experts in (False, True):
        keys = [key for key in held if rules[key[0]].per_expert == of_experts]
        if not keys:
            continue
        group = replica_group(rules[keys[0][0]], groups)
        loads = [0] * group.size()
        for key in keys:
            reader = loads.index(min(loads))
            loads[reader] += held[key].nbytes
            shared.append(SharedTensor(key, group, reader))
    return shared


def read_in_shares(
    held: Mapping[TensorId, Tensor], shared: list[SharedTensor], fill: Callable[[TensorId, Tensor], None], groups: ProcessGroups
) -> None:
    """Fill this rank's tensors, each read by one rank and sent to the others. All ranks call it together.

    Args:
        held: contiguous tensors, overwritten.
        shared: of :func:`share_reading`.
        fill: reads one tensor from the disk; calls no collective.
        groups: the process groups of this rank.

    Raises:
        RmipoError: on every rank: one could not read its share.
    """

    def read() -> None:
        for key, group, reader in shared:
            if reader == group.rank():
                fill(key, held[key])

    on_each_rank_alone(groups.world, read)
    for key, group, reader in shared:
        # Bytes: not every backend sends every dtype.
        dist.broadcast(held[key].flatten().view(torch.uint8), group=group, group_src=reader)
