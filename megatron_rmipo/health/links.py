"""How fast each process group is, and each link in it: measured at the start of a run (``--check-links``).

Shape letters: G ranks of a group.
"""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_rmipo.runtime.agreement import device_of
from megatron_rmipo.runtime.groups import ProcessGroups

# Enough to be about bandwidth; over gloo a tenth of a second for the slowest of networks.
_BYTES_ON_GPU, _BYTES_ON_CPU = 32 * 2**20, 2**20
_REPEATS = 5
# Of the kinds of groups, in the order they are told.
KINDS = ("tp", "cp", "ep", "pp", "dp", "world")
ALL_REDUCE, NEIGHBOURS = "all_reduce", "send_recv"


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one rank measured of one thing it did with others.

    Attributes:
        kind: of the group, one of :data:`KINDS`.
        what: ``all_reduce`` of the whole group, or ``send_recv``, both ways at once, with the next rank of it.
        ranks: that took part, this one first in a ``send_recv``; numbers among all.
        hosts: theirs.
        seconds: the least of some repetitions, which is what the machines can do.
        num_bytes: sent by each of them.
    """

    kind: str
    what: str
    ranks: tuple[int, ...]
    hosts: tuple[str, ...]
    seconds: float
    num_bytes: int

    @property
    def crosses_hosts(self) -> bool:
        """Whether it went over the network between hosts."""
        return len(set(self.hosts)) > 1

    @property
    def bytes_per_second(self) -> float:
        """What each rank's link carried, in one direction; of an all-reduce as a ring does it (nccl-tests' bus bandwidth)."""
        size = len(self.ranks)
        share = 2 * (size - 1) / size if self.what == ALL_REDUCE else 1.0
        return share * self.num_bytes / max(self.seconds, 1e-9)


def measure_links(groups: ProcessGroups) -> list[Measured]:
    """Time a collective over every group of more than one rank, and each rank's exchange with its neighbours there.

    Groups of one kind do it at the same time, as in a step. All ranks call it together; it takes seconds.

    Returns:
        On the first rank what all ranks measured, once each; elsewhere nothing.
    """
    hosts: list[Any] = [None] * groups.world_size
    dist.all_gather_object(hosts, socket.gethostname(), group=groups.world)
    own: list[Measured] = []
    for kind in KINDS:
        group = getattr(groups, kind)
        # Ranks of every kind come through the same meetings, whether their group has several or not.
        own += _measure_group(kind, group, hosts, groups.world)
    gathered: list[Any] | None = [None] * groups.world_size if groups.rank == 0 else None
    dist.gather_object(own, gathered, dst=0, group=groups.world)
    return [one for found in gathered or [] for one in found]


def _measure_group(kind: str, group: dist.ProcessGroup, hosts: list[str], world: dist.ProcessGroup) -> list[Measured]:
    if group.size() == 1:
        # Sizes of a kind are the same everywhere.
        return []
    members = dist.get_process_group_ranks(group)
    device = device_of(group)
    data = torch.ones((_BYTES_ON_GPU if device.type == "cuda" else _BYTES_ON_CPU) // 4, device=device)
    found = []
    seconds = _least_seconds(lambda: dist.all_reduce(data, group=group), group, world)
    if group.rank() == 0:
        found.append(_measured(kind, ALL_REDUCE, members, hosts, seconds, data))
    received = torch.empty_like(data)
    for first, second in _rounds(group.size(), group.rank()):
        other = second if first == group.rank() else first
        exchange = (lambda other=other: _exchange(data, received, members[other], group)) if other is not None else None
        seconds = _least_seconds(exchange, None, world)
        if first == group.rank() and second is not None:
            found.append(_measured(kind, NEIGHBOURS, [members[first], members[second]], hosts, seconds, data))
    return found


def _measured(kind: str, what: str, ranks: list[int], hosts: list[str], seconds: float, data: torch.Tensor) -> Measured:
    return Measured(kind, what, tuple(ranks), tuple(hosts[rank] for rank in ranks), seconds, data.nbytes)


def _rounds(size: int, rank: int) -> Iterator[tuple[int | None, int | None]]:
    """The links of a ring, dealt out so that no rank is in two at once: of each round (first, second) of this rank's, or None.

    Two ranks have one link, not two.
    """
    links = [(place, (place + 1) % size) for place in range(size if size > 2 else 1)]
    last = [links.pop()] if size % 2 and size > 2 else []
    for taken in (links[0::2], links[1::2], last):
        yield next((link for link in taken if rank in link), (None, None))


def _exchange(data: torch.Tensor, received: torch.Tensor, other: int, group: dist.ProcessGroup) -> None:
    for work in dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, data, other, group), dist.P2POp(dist.irecv, received, other, group)]
    ):
        work.wait()


def _least_seconds(call: Callable[[], object] | None, group: dist.ProcessGroup | None, world: dist.ProcessGroup) -> float:
    """The least that a call took of some, after one; ranks start it together, those without one wait."""
    times = []
    for _ in range(_REPEATS + 1):
        dist.barrier(group=group if group is not None else world)
        started = time.perf_counter()
        if call is not None:
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    # The first one makes connections.
    return min(times[1:])
