"""Which ranks tell how a command ends, and under which name."""

from __future__ import annotations

import sys

import torch.distributed as dist

from megatron_rmipo.torchrun import launch_for_messages


def rank_label() -> str:
    """``[rank 3]`` and a space before a message, where there are several ranks."""
    launch = launch_for_messages()
    return f"[rank {launch.rank}] " if launch.world_size > 1 else ""


def speaks_for_its_node() -> bool:
    """Whether this rank tells its errors: one rank of a node, until the ranks are connected, and every rank from then on."""
    # Before that they all end with the same error.
    return dist.is_initialized() or launch_for_messages().local_rank == 0


def tell_stop(text: str) -> None:
    """Say on the first rank how a stopped command goes on."""
    if launch_for_messages().rank == 0:
        print(f"stopped: {text}", file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Show a line on this rank that is neither a result nor an error."""
    print(f"{rank_label()}warning: {text}", file=sys.stderr, flush=True)
