"""Which ranks tell how a command ends and how far it is, and under which name."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

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


def progress_bar(title: str, total: int, unit: str, *, shown: bool) -> tqdm[Any]:
    """A bar on stderr, in bytes (``B``) or what else is counted."""
    # A log file gets a line now and then instead of one that is redrawn.
    interval = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(desc=title, total=total, unit=unit, unit_scale=unit == "B", disable=not shown, mininterval=interval)
