"""Which ranks tell how a command ends, and under which name."""

from __future__ import annotations

import os
import sys

import torch.distributed as dist


def rank_label() -> str:
    """``[rank 3]`` and a space before a message, where there are several ranks."""
    return f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def speaks_for_its_node() -> bool:
    """Whether this rank tells its errors: one rank of a node, until the ranks are connected, and every rank from then on."""
    # Before that they all read the same input and would all say the same.
    return dist.is_initialized() or os.environ.get("LOCAL_RANK", "0") == "0"


def tell_stop(text: str) -> None:
    """Say on the first rank how a stopped command goes on."""
    if os.environ.get("RANK", "0") == "0":
        print(f"stopped: {text}", file=sys.stderr, flush=True)
