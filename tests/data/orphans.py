"""A process that is killed as the kernel does it where memory runs out, and what becomes of its workers."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether it does within so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := holds()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def workers_left_by(target: Callable[..., Any], *args: Any, when: Callable[[], bool]) -> list[psutil.Process]:
    """Run ``target(*args)`` in a process, kill that one when ``when`` holds, and give the workers that live ten seconds later.

    Raises:
        AssertionError: it had no workers then.
    """
    process = multiprocessing.get_context("forkserver").Process(target=target, args=args)
    process.start()
    try:
        assert wait_until(when), "it did not come so far"
        workers = psutil.Process(process.pid).children(recursive=True)
        assert workers
        process.kill()
        process.join()
        wait_until(lambda: not any(map(_lives, workers)), 10)
        left = [worker for worker in workers if _lives(worker)]
        for worker in left:
            worker.kill()
        return left
    finally:
        process.kill()


def _lives(process: psutil.Process) -> bool:
    # Where nobody adopts orphans a dead one stays a zombie.
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def count_files(folder: Path) -> int:
    """Files there."""
    return sum(1 for _ in folder.iterdir())
