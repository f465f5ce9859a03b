"""A rank's writers beside the training: one process that writes what it was forked with, until all ranks' are done."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, TemporalAsyncCaller

from megatron_rmipo.errors import CheckpointError
from megatron_rmipo.runtime.agreement import gather_faults
from megatron_rmipo.runtime.worker_process import end_with_parent


class BackgroundWrite:
    """Megatron-Core's request to write a rank's share, under way in a process of its own.

    What it writes is on the host when this returns: copied from the device, or, on the CPU, as the process was forked with it.

    Args:
        request: of ``dist_checkpointing.save(..., async_sharded_save=True)``. All ranks start theirs together.
        world: all ranks.
    """

    def __init__(self, request: AsyncRequest, world: dist.ProcessGroup) -> None:
        self._request, self._world = request, world
        self._caller = TemporalAsyncCaller()
        if request.async_fn is not None:
            request = request._replace(async_fn=partial(_write, request.async_fn))
        self._caller.schedule_async_call(request)
        self._process = self._caller.process

    def finish_if_written(self) -> bool:
        """Whether all ranks' processes have ended; then what they wrote is put together. All ranks call it together.

        Raises:
            CheckpointException: on every rank: one could not write.
            CheckpointError: on every rank: the process of one was ended before it was through.
        """
        if not self._caller.is_current_async_call_done(blocking=False, no_dist=False):
            return False
        # What it met itself it has told, and ended by itself.
        code = 0 if self._process is None else self._process.exitcode
        for rank, ended in gather_faults(self._world, code or None):
            how = f"by signal {-ended}, as happens where the host's memory runs out" if ended < 0 else f"with exit code {ended}"
            raise CheckpointError(f"the process that wrote the share of rank {rank} ended {how}")
        for finish in self._request.finalize_fns:
            finish()
        return True

    def abandon(self) -> None:
        """End this rank's process as it stands."""
        if self._process is not None:
            self._process.kill()
            self._process.join()


def _write(write: Any, *args: Any, **named: Any) -> None:
    # Before it starts writers of its own, which end with it.
    end_with_parent()
    write(*args, **named)
