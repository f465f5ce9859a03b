"""Whose own work takes longest in a step: ranks wait for each other, so that one which is slow makes all of them so."""

from __future__ import annotations

import dataclasses
import socket
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_rmipo.runtime.groups import ProcessGroups, current_device

SHARE, RANK, HOST = "straggler_share", "straggler_rank", "straggler_host"


@dataclasses.dataclass(frozen=True)
class Straggler:
    """The rank that was slowest against its equals.

    Attributes:
        rank: its number.
        seconds: by which its own work took longer than that of the median rank of its pipeline stage.
    """

    rank: int
    seconds: float


class Pace:
    """Compares how long the ranks' own work took. All ranks make it together.

    Own work is the wait for the batch and the passes of this rank's stage, without the waits for other stages and replicas. Ranks
    that share layers or rows (TP, CP, EP) wait for each other within the passes: where one of them is slow, all of its group are.

    Args:
        groups: the process groups of this rank.
    """

    def __init__(self, groups: ProcessGroups) -> None:
        self._groups = groups
        hosts: list[Any] | None = [None] * groups.world_size if groups.rank == 0 else None
        dist.gather_object(socket.gethostname(), hosts, dst=0, group=groups.world)
        self._hosts = hosts

    def compare(self, own_seconds: float, step_seconds: float) -> tuple[dict[str, float], dict[str, str]]:
        """What a record says of one step. All ranks call it together: two numbers of each are reduced.

        Args:
            own_seconds: of this rank's own work.
            step_seconds: of the whole step.

        Returns:
            ``straggler_share``: seconds by which the slowest rank's own work took longer than that of the median rank of its
            stage, over those of the step; ``straggler_rank``; and, on the first rank, the text ``straggler_host``. Empty without
            other ranks.
        """
        groups = self._groups
        if groups.world_size == 1:
            return {}, {}
        found = torch.zeros((groups.world_size, 2), dtype=torch.float64)
        found[groups.rank] = torch.tensor([own_seconds, groups.pp_rank], dtype=torch.float64)
        # A sum of which every rank has one row: versions of torch call the gathering by other names.
        found = found.to(current_device())
        dist.all_reduce(found, group=groups.world)
        straggler = slowest_rank([(seconds, int(stage)) for seconds, stage in found.tolist()])
        numbers = {SHARE: straggler.seconds / max(step_seconds, 1e-9), RANK: straggler.rank}
        return numbers, {HOST: self._hosts[straggler.rank]} if self._hosts is not None else {}


def slowest_rank(own: Sequence[tuple[float, int]]) -> Straggler:
    """The rank whose own work took longest against the median of its stage.

    Args:
        own: of each rank its seconds and its pipeline stage; stages have different work.
    """
    by_stage: dict[int, list[float]] = {}
    for seconds, stage in own:
        by_stage.setdefault(stage, []).append(seconds)
    # Of two the quicker one, so that the other is seen.
    medians = {stage: statistics.median_low(seconds) for stage, seconds in by_stage.items()}
    behind = [seconds - medians[stage] for seconds, stage in own]
    rank = max(range(len(own)), key=behind.__getitem__)
    return Straggler(rank, behind[rank])
