"""Whole tensors out of the shards that ranks hold: tensor-parallel ones, pipeline stages, ranks with different experts.

Of each shard the first rank that holds it sends it to the first of all ranks, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rmipo.checkpoint.hf.mappings import TensorId
from megatron_rmipo.checkpoint.hf.shards import join_shards
from megatron_rmipo.checkpoint.hf.writer import MegatronTensor
from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Rule
from megatron_rmipo.families.tensors import rules_of, tensors_of
from megatron_rmipo.runtime.groups import ProcessGroups


class _Shard(NamedTuple):
    """A rank's part of a tensor: which of how many it is, and what it looks like."""

    number: int
    of: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def sharing_group(rule: Rule, groups: ProcessGroups) -> dist.ProcessGroup:
    """The ranks that share a tensor of this kind, each with its shard where it is cut."""
    return groups.expert_tp if rule.per_expert else groups.tp


class GatheredTensors:
    """The tensors of a model, whole, on the first of all ranks. All ranks make it together.

    Args:
        held: this rank's tensors.
        arch: the model.
        groups: the process groups of this rank.

    Attributes:
        dtypes: on the first rank, dtype of each Megatron name; elsewhere empty.

    Raises:
        ConversionError: on every rank: no rank holds a tensor of the model.
    """

    def __init__(self, held: Mapping[TensorId, Tensor], arch: ModelArchitecture, groups: ProcessGroups) -> None:
        self._held, self._arch, self._groups = held, arch, groups
        own = _describe(held, arch, groups)
        everywhere: list[dict[TensorId, _Shard]] = [{} for _ in range(groups.world_size)]
        dist.gather_object(own, everywhere if groups.rank == 0 else None, group=groups.world, group_dst=0)
        # On the first rank: who sends each shard of each tensor, and the shard.
        self._senders: dict[TensorId, dict[int, tuple[int, _Shard]]] = {}
        asked: list[set[TensorId]] = [set() for _ in range(groups.world_size)]
        for rank, shards in enumerate(everywhere):
            for key, shard in shards.items():
                senders = self._senders.setdefault(key, {})
                if shard.number not in senders:
                    senders[shard.number] = rank, shard
                    asked[rank].add(key)
        missing = [key for key in _keys(arch) if not self._is_whole(key)] if groups.rank == 0 else []
        answer: list[tuple[set[TensorId], list[TensorId]]] = [(set(), [])]
        answers = [(keys, missing) for keys in asked] if groups.rank == 0 else None
        dist.scatter_object_list(answer, answers, group=groups.world, group_src=0)
        self._to_send, missing = answer[0]
        if missing:
            names = ", ".join(f"{name} at {place}" for name, place in missing[:4])
            raise ConversionError(f"No rank's model holds {names}. Build it from the checkpoint's config.json.")
        self.dtypes = {name: senders[0][1].dtype for (name, _), senders in self._senders.items()}

    def each(self, before_each: Callable[[], None]) -> Iterator[MegatronTensor]:
        """In checkpoint order, on the first rank; elsewhere it ends without giving any. All ranks go through it together.

        Args:
            before_each: called before each tensor.
        """
        for rule, place in tensors_of(self._arch):
            before_each()
            key = rule.megatron, place
            if self._groups.rank == 0:
                whole = join_shards([shard for _, shard in sorted(self._receive(key))], rule)
                yield MegatronTensor(rule, place, whole.dtype, _row_reader(whole))
            elif key in self._to_send:
                # As bytes, which every backend sends.
                dist.send(self._held[key].contiguous().view(torch.uint8), group=self._groups.world, group_dst=0)

    def _is_whole(self, key: TensorId) -> bool:
        senders = self._senders.get(key, {})
        return 0 in senders and len(senders) == senders[0][1].of

    def _receive(self, key: TensorId) -> Iterator[tuple[int, Tensor]]:
        world = self._groups.world
        device = torch.cuda.current_device() if dist.get_backend(world) == "nccl" else "cpu"
        for number, (rank, shard) in self._senders[key].items():
            if rank == 0:
                yield number, self._held[key]
            else:
                received = torch.empty(shard.shape, dtype=shard.dtype, device=device)
                dist.recv(received.view(torch.uint8), group=world, group_src=rank)
                yield number, received


def _describe(held: Mapping[TensorId, Tensor], arch: ModelArchitecture, groups: ProcessGroups) -> dict[TensorId, _Shard]:
    rules = {rule.megatron: rule for rule in rules_of(arch)}
    shards = {}
    for (name, place), tensor in held.items():
        group = sharing_group(rules[name], groups)
        number, count = (group.rank(), group.size()) if rules[name].is_cut else (0, 1)
        shards[name, place] = _Shard(number, count, tuple(tensor.shape), tensor.dtype)
    return shards


def _keys(arch: ModelArchitecture) -> Iterator[TensorId]:
    yield from ((rule.megatron, place) for rule, place in tensors_of(arch))


def _row_reader(tensor: Tensor) -> Callable[[int, int], Tensor]:
    return lambda start, stop: tensor[start:stop]
