"""Whether a checkpoint's files hold what was written: compared with the digests of its record, by all ranks together."""

from __future__ import annotations

import heapq
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

from megatron_rmipo.checkpoint.megatron.record import CheckpointRecord
from megatron_rmipo.checkpoint.raw_files import file_digest
from megatron_rmipo.checkpoint.whole_directories import SEEN_WITHIN_SECONDS, is_seen
from megatron_rmipo.command import progress_bar
from megatron_rmipo.errors import CheckpointError
from megatron_rmipo.runtime.agreement import gather_faults, on_each_rank_alone

_NUM_THREADS = min(4, os.cpu_count() or 1)


def check_digests(path: Path, record: CheckpointRecord) -> list[str]:
    """Names of a checkpoint's files whose contents are not what was written, in one process. Nothing is checked in format 1."""
    sizes = [record.files.get(name, 0) for name in record.digests]
    found = {}
    with ThreadPoolExecutor(_NUM_THREADS) as pool, progress_bar(f"checking {path}", sum(sizes), "B", shown=True) as bar:
        digests = pool.map(lambda name: _digest_or_none(path / name), record.digests)
        for name, size, digest in zip(record.digests, sizes, digests, strict=True):
            found[name] = digest
            bar.update(size)
    return [name for name, digest in record.digests.items() if found[name] != digest]


def check_digests_together(path: Path, record: CheckpointRecord, group: dist.ProcessGroup) -> list[str]:
    """As :func:`check_digests`, the files shared out over the ranks of ``group``, which call it together with the same record.

    Returns:
        Names of damaged files, the same on every rank.

    Raises:
        CheckpointError: on every rank: one does not see a file that the first rank has seen.
    """
    if not record.digests:
        return []
    own = _read_share(path, record.files, group)
    damaged = [name for name, digest in own.items() if digest != record.digests.get(name)]
    # What is whole, a thousand ranks need not tell each other.
    told = {name for _, names in gather_faults(group, damaged or None) for name in names}
    return [name for name in record.digests if name in told or name not in record.files]


def gather_digests(path: Path, sizes: Mapping[str, int], group: dist.ProcessGroup) -> dict[str, str | None]:
    """sha256 of files by name, None where one cannot be read. All ranks of ``group`` call it together and share the reading.

    Args:
        path: the folder they lie in, which every rank sees.
        sizes: bytes to read by name, the same on every rank.
        group: the ranks.

    Raises:
        CheckpointError: on every rank: one does not see a file.
    """
    own = _read_share(path, sizes, group)
    parts: list[dict[str, str | None]] = [{}] * group.size()
    dist.all_gather_object(parts, own, group=group)
    return {name: digest for digests in parts for name, digest in digests.items()}


def _read_share(path: Path, sizes: Mapping[str, int], group: dist.ProcessGroup) -> dict[str, str | None]:
    """sha256 of this rank's share of the files, as :func:`gather_digests`."""
    names = share_out(sizes, group.size())[group.rank()]
    refuse_unseen((path / name for name in names), group)
    # Of few large files most ranks have none to read.
    return on_each_rank_alone(group, lambda: {name: _digest_or_none(path / name) for name in names})


def refuse_unseen(paths: Iterable[Path], group: dist.ProcessGroup) -> None:
    """Refuse files, of any each rank's own, that the rank does not see within a while. All ranks of ``group`` call it together.

    Raises:
        CheckpointError: on every rank: naming the first rank that does not see one, its host and the file.
    """

    def look() -> None:
        deadline = time.monotonic() + SEEN_WITHIN_SECONDS
        for path in paths:
            if not is_seen(path, deadline):
                raise CheckpointError(
                    f"rank {group.rank()} on {socket.gethostname()} does not see {path}, which the first rank sees. A checkpoint "
                    "must lie on a file system that all hosts share."
                )

    on_each_rank_alone(group, look)


def share_out(sizes: Mapping[str, int], num_ranks: int) -> list[list[str]]:
    """Names for each rank, so that all have about as much to read: the largest first, each to who has least."""
    shares: list[list[str]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, rank = loads[0]
        shares[rank].append(name)
        heapq.heapreplace(loads, (load + sizes[name], rank))
    return shares


def damage(path: Path, names: Sequence[str]) -> str:
    """How a checkpoint's damage is told."""
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"{path} is damaged: {shown} {'does' if len(names) == 1 else 'do'} not hold what was written"


def _digest_or_none(path: Path) -> str | None:
    try:
        return file_digest(path)
    except OSError:
        return None
