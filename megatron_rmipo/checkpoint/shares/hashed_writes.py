"""Digests of what Megatron-Core's writers write, taken from the bytes on their way to the disk."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import multiprocessing.managers
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_rmipo.runtime.worker_process import end_with_parent


class _HashingFile(io.FileIO):
    """A file that is hashed while it is written, and sends name and digest when it is closed without an error, else the error.

    A failed write is raised again at the end of the ``with`` block: torch's archive answers it with complaints of its own length.
    """

    def __init__(self, path: str, send: Callable[[tuple[str, str | OSError]], None]) -> None:
        super().__init__(path, "wb")
        self._path, self._send, self._digest = path, send, hashlib.sha256()
        self._failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        done = 0
        try:
            # The caller expects of a file that all of it is taken at once.
            while done < len(view):
                done += super().write(view[done:])
        except OSError as error:
            self._failure = error
            raise
        self._digest.update(view)
        return done

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if self._failure is not None:
            # Megatron-Core may hand on no more than its type.
            self._send((os.path.basename(self._path), self._failure))
            raise self._failure from None
        if error is None:
            self._send((os.path.basename(self._path), self._digest.hexdigest()))


class HashedWrites:
    """Within its block, what Megatron-Core's writers of this rank write is hashed: sha256 by name of the files they have written.

    Writer processes are forked within the block, so that they open their files as this process would, and hand the digests back
    through a pipe; they may outlive it.

    Attributes:
        digests: filled by :meth:`collect`.
        failure: why a writer failed, filled likewise.
    """

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}
        self.failure: OSError | None = None
        self._pipe = multiprocessing.get_context("fork").SimpleQueue()
        self._is_collected = False

    def __enter__(self) -> HashedWrites:
        _start_results_queue()
        module: Any = filesystem_async
        rank, put = os.getpid(), self._pipe.put

        def open_hashing(path: str, mode: str) -> _HashingFile:
            if os.getpid() != rank:
                end_with_parent()
            return _HashingFile(path, put)

        # Its own name for the builtin, which it would look up next.
        module.open = open_hashing
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        module: Any = filesystem_async
        del module.open

    def collect(self) -> None:
        """Take what the writers have handed back. Called once they have ended; the second time there is nothing more."""
        if self._is_collected:
            return
        self._is_collected = True
        while not self._pipe.empty():
            name, outcome = self._pipe.get()
            if isinstance(outcome, OSError):
                self.failure = outcome
            else:
                self.digests[name] = outcome
        self._pipe.close()


def _start_results_queue() -> None:
    """Start what Megatron-Core gathers its writers' results in, where it has not: its server would outlive a killed rank."""
    module: Any = filesystem_async
    if module._results_queue is None:
        manager = multiprocessing.managers.SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(initializer=end_with_parent)
        module._results_queue = manager.Queue()
