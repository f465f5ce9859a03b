"""Which rank of a run failed first, told through the store that connected the ranks: a rank that fails can call no collective."""

from __future__ import annotations

import contextlib
from typing import Any

import torch.distributed as dist

_KEY = "megatron_rmipo/first_failure"


def claim_first_failure(text: str) -> bool:
    """Whether no other rank has failed before this one, as far as can be known; if so, ``text`` is left for the others."""
    with contextlib.suppress(RuntimeError):
        first: str = _store().compare_set(_KEY, "", text).decode()
        return first == text
    return True


def first_failure() -> str | None:
    """What the rank that failed first left, or None."""
    with contextlib.suppress(RuntimeError):
        store = _store()
        if store.check([_KEY]):
            text: str = store.get(_KEY).decode()
            return text
    return None


def _store() -> Any:
    # RuntimeError: the ranks are not connected, or the rank that keeps the store is gone.
    if not dist.is_initialized():
        raise RuntimeError("not connected")
    return dist.distributed_c10d._get_default_store()
