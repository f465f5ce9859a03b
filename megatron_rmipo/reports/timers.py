"""Where the time of a step goes, as the host sees it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch

from megatron_rmipo.runtime.tracing import trace_range

Phase = Literal["data", "before", "gradient", "optimizer"]
PHASES: tuple[Phase, ...] = get_args(Phase)


class PhaseTimer:
    """Adds up the seconds the host spends in each phase of a step.

    ``data`` is the wait for the batch, ``before`` the forward-only passes before the gradient pass, ``gradient`` forward and
    backward with the reduction of gradients, ``optimizer`` norm, clipping and update. It never waits for a device: work that a
    phase leaves running there counts for the phase that waits for it.

    Args:
        told: called with the name of each phase that begins.
    """

    def __init__(self, told: Callable[[str], None] | None = None) -> None:
        self._seconds: dict[str, float] = {}
        self._told = told

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """What happens within belongs to this phase, also in a trace (:mod:`megatron_rmipo.reports.profiler`)."""
        if self._told is not None:
            self._told(name)
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

    Args:
        on_device: mark the work on the GPU's stream, where it runs, instead of reading the host's clock, beside which it does.
    """

    def __init__(self, *, on_device: bool = False) -> None:
        self.on_device = on_device
        self._host_seconds = self._started = 0.0
        self._marks: list[tuple[Any, Any]] = []
        self._counts = False

    def __call__(self, name: str, log_level: int | None = None) -> StageClock:
        """What Megatron starts and stops; it does so with nothing else in between."""
        self._counts = name in ("forward-compute", "backward-compute")
        return self

    def start(self, **_: Any) -> None:
        """A piece of work begins."""
        if not self._counts:
            return
        if self.on_device:
            self._marks.append((self._mark(), None))
        else:
            self._started = time.perf_counter()

    def stop(self, **_: Any) -> None:
        """It ends."""
        if not self._counts:
            return
        if self.on_device:
            self._marks[-1] = (self._marks[-1][0], self._mark())
        else:
            self._host_seconds += time.perf_counter() - self._started

    @property
    def busy_seconds(self) -> float:
        """Since the clock was set back. On a GPU it waits for the work; a step has waited for it already."""
        if self._marks:
            self._marks[-1][1].synchronize()
        return self._host_seconds + sum(float(begun.elapsed_time(ended)) for begun, ended in self._marks) / 1e3

    def set_back(self) -> None:
        """Count from here."""
        self._host_seconds = 0.0
        self._marks = []

    def _mark(self) -> Any:
        mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        mark.record()
        return mark
