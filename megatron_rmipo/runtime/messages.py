"""Which ranks tell how a command ends, and under which name."""

from __future__ import annotations

import sys

import torch.distributed as dist

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.runtime.launch import Launch, read_launch


def rank_label() -> str:
    """``[rank 3]`` and a space before a message, where there are several ranks."""
    launch = _launch()
    return f"[rank {launch.rank}] " if launch.world_size > 1 else ""


def speaks_for_its_node() -> bool:
    """Whether this rank tells its errors: one rank of a node, until the ranks are connected, and every rank from then on."""
    # Before that they all end with the same error.
    return dist.is_initialized() or _launch().local_rank == 0


def tell_stop(text: str) -> None:
    """Say on the first rank how a stopped command goes on."""
    if _launch().rank == 0:
        print(f"stopped: {text}", file=sys.stderr, flush=True)


def _launch() -> Launch:
    # A place that cannot be read is itself an error to tell: no message may die of it.
    try:
        return read_launch()
    except ConfigError:
        return Launch()
