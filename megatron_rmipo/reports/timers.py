"""Where the time of a step goes, as the host sees it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Literal, get_args

from megatron_rmipo.runtime.tracing import trace_range

Phase = Literal["data", "before", "gradient", "optimizer"]
PHASES: tuple[Phase, ...] = get_args(Phase)


class PhaseTimer:
    """Adds up the seconds the host spends in each phase of a step.

    ``data`` is the wait for the batch, ``before`` the forward-only passes before the gradient pass, ``gradient`` forward and
    backward with the reduction of gradients, ``optimizer`` norm, clipping and update. It never waits for a device: work that a
    phase leaves running there counts for the phase that waits for it.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """What happens within belongs to this phase, also in a trace (:mod:`megatron_rmipo.reports.profiler`)."""
        started = time.perf_counter()
        try:
            with trace_range(name):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call; phases that did not happen are left out."""
        taken, self._seconds = self._seconds, {}
        return taken
