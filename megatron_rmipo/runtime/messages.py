"""Which ranks tell an error, and under which name."""

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


def warn(text: str) -> None:
    """Show a line on this rank that is neither a result nor an error."""
    print(f"{rank_label()}warning: {text}", file=sys.stderr, flush=True)
