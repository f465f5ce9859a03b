"""Worker processes that end with the process they work for, whatever ends that one."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_SECONDS_BETWEEN_LOOKS = 1.0


def end_with_parent() -> None:
    """Have this worker killed when the process that started it ends, by SIGKILL too. Called by a worker as its first act.

    On Linux the kernel does it, when the thread that started the worker ends: start workers from a thread that outlives them.
    Elsewhere a thread looks for the parent once a second.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "called by a process that is no worker"
    parent_pid = parent.pid
    assert parent_pid is not None
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent_pid,), daemon=True).start()
    # It may have ended before it could be watched.
    if os.getppid() != parent_pid:
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os._exit(1)
