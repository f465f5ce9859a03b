"""Where the time of a step goes, as the host sees it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Literal, get_args

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


class StageClock:
    """In the place of Megatron's timers (``config.timers``): seconds in which this rank's stage ran packs, forward or backward.

    Read on the host, so that they mean something where nothing runs beside it: without CUDA.

    Attributes:
        busy_seconds: since the clock was set back.
    """

    def __init__(self) -> None:
        self.busy_seconds = 0.0
        self._started = 0.0
        self._counts = False

    def __call__(self, name: str, log_level: int | None = None) -> StageClock:
        """What Megatron starts and stops; it does so with nothing else in between."""
        self._counts = name in ("forward-compute", "backward-compute")
        return self

    def start(self, **_: Any) -> None:
        """A piece of work begins."""
        if self._counts:
            self._started = time.perf_counter()

    def stop(self, **_: Any) -> None:
        """It ends."""
        if self._counts:
            self.busy_seconds += time.perf_counter() - self._started
