"""A rank's writers beside the training: one process that writes what it was forked with, until all ranks' are done."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, TemporalAsyncCaller

from megatron_rmipo.runtime.worker_process import end_with_parent


class BackgroundWrite:
    """Megatron-Core's request to write a rank's share, under way in a process of its own.

    What it writes is on the host when this returns: copied from the device, or, on the CPU, as the process was forked with it.

    Args:
        request: of ``dist_checkpointing.save(..., async_sharded_save=True)``. All ranks start theirs together.
    """

    def __init__(self, request: AsyncRequest) -> None:
        self._request = request
        self._caller = TemporalAsyncCaller()
        if request.async_fn is not None:
            request = request._replace(async_fn=partial(_write, request.async_fn))
        self._caller.schedule_async_call(request)

    def finish_if_written(self) -> bool:
        """Whether all ranks' processes have ended; then what they wrote is put together. All ranks call it together.

        Raises:
            CheckpointException: on every rank: one could not write.
        """
        if not self._caller.is_current_async_call_done(blocking=False, no_dist=False):
            return False
        for finish in self._request.finalize_fns:
            finish()
        return True

    def abandon(self) -> None:
        """End this rank's process as it stands."""
        if self._caller.process is not None:
            self._caller.process.kill()
            self._caller.process.join()


def _write(write: Any, *args: Any, **named: Any) -> None:
    # Before it starts writers of its own, which end with it.
    end_with_parent()
    write(*args, **named)
