"""Which rank of a run failed first, told through the store that connected the ranks: a rank that fails can call no collective."""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from typing import Any

import torch.distributed as dist

from megatron_rmipo.command import FAULT_OF_OURS, FAULT_OF_USER
from megatron_rmipo.errors import RmipoError
from megatron_rmipo.runtime.messages import rank_label, speaks_for_its_node
from megatron_rmipo.torchrun import launch_for_messages

_KEY = "megatron_rmipo/first_failure"
_SILENT_SECONDS = 1.0


def claim_first_failure(text: str) -> bool:
    """Whether no other rank has failed before this one, as far as can be known; if so, its first ``text`` is left for them."""
    # Not connected, or the rank that keeps the store is gone.
    with contextlib.suppress(RuntimeError):
        store, own = connecting_store(), f"{dist.get_rank()} "
        first: str = store.compare_set(_KEY, "", own + text).decode()
        return first.startswith(own)
    return True


def first_failure() -> str | None:
    """What the rank that failed first left, or None."""
    with contextlib.suppress(RuntimeError):
        store = connecting_store()
        if store.check([_KEY]):
            text: str = store.get(_KEY).decode()
            return text.partition(" ")[2]
    return None


def tell_failure(error: RmipoError | RuntimeError, *, debug: bool) -> int:
    """Say on this rank why a command ends, if it has something to say; returns the exit code.

    Args:
        error: a fault the user can mend, or a collective that lost a rank: why is that rank's to tell.
        debug: show tracebacks instead.

    Raises:
        RuntimeError: ``error``, where it is no loss of a rank and none told of a failure, or with ``debug``.
    """
    if isinstance(error, RuntimeError):
        cause = first_failure()
        if debug or (cause is None and not lost_a_rank(error)):
            raise error
        gone = "another rank is gone, or did not answer within --distributed-timeout-minutes; its output may say why"
        text = f"{gone} ({str(error).splitlines()[0]})" if cause is None else cause
        print(f"{rank_label()}stopped, since {text}", file=sys.stderr, flush=True)
        return FAULT_OF_OURS if cause is None else FAULT_OF_USER
    # A rank that loses this one, perhaps on another node, says so, too.
    own = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    is_first = claim_first_failure(f"{rank_label()}{own}")
    # A fault that all ranks meet alike is told once a node.
    is_told = not is_first and (first_failure() or "").endswith(own)
    if not is_first:
        # The first one may still be telling, and torchrun ends it once this one has left.
        time.sleep(_SILENT_SECONDS)
    if debug:
        traceback.print_exception(error)
    elif speaks_for_its_node() and not (is_told and launch_for_messages().local_rank != 0):
        print(f"{rank_label()}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    elif is_first:
        # Not connected: one rank of the node tells.
        time.sleep(_SILENT_SECONDS)
    return FAULT_OF_USER


def lost_a_rank(error: BaseException) -> bool:
    """Whether this is what a collective raises where another rank is gone or did not answer."""
    # gloo has no error type of its own; NCCL's and the store's are of torch.distributed's.
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo/transport" in str(error))


def connecting_store() -> Any:
    """The store that connected the ranks.

    Raises:
        RuntimeError: they are not connected.
    """
    if not dist.is_initialized():
        raise RuntimeError("not connected")
    return dist.distributed_c10d._get_default_store()
