"""Traces of chosen steps by torch.profiler, as chrome://tracing and Perfetto read them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import torch

from megatron_rmipo.runtime.tracing import trace_range


class StepProfiler:
    """Records some steps of this rank (CPU, and CUDA where there is one) and writes one trace of them.

    The trace is written when the last of the steps is over. As a context manager it also writes, at the end, what there is of a
    run that ends before, whatever ends it. Ranks profile independently of each other: nothing here is collective.

    Args:
        path: the trace, ``.json.gz``; its directory is created. An older one is replaced.
        steps: numbers of the steps to record, counted from 1; empty: this rank records nothing.
        say: told where the trace lies, or why it could not be written.
    """

    def __init__(self, path: Path, steps: range, say: Callable[[str], None]) -> None:
        self._path, self._steps, self._say = path, steps, say
        self._recorded: list[int] = []
        self._prepared = False
        if steps:
            self._profile = torch.profiler.profile()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Step ``number`` of the run, counted from 1, is what happens within; steps come in order."""
        self._begin(number)
        # The name by which TensorBoard and HTA know a step.
        with trace_range(f"ProfilerStep#{number}"):
            yield
        if number == self._steps.stop - 1:
            self.stop()
            self.write()

    def _begin(self, number: int) -> None:
        # A step early: the first one recorded would pay for the preparations.
        if self._steps.start - 1 <= number < self._steps.stop and not self._prepared:
            self._profile.prepare_trace()
            self._prepared = True
        if number in self._steps:
            if not self._recorded:
                self._profile.start_trace()
            self._recorded.append(number)

    def stop(self) -> None:
        """Record no more; :meth:`write` may come later. Doing it twice does nothing."""
        if not self._prepared:
            return
        if not self._recorded:
            # torch knows no other way to end what was prepared.
            self._profile.start_trace()
        self._profile.stop_trace()
        self._prepared = False

    def write(self) -> None:
        """Write what was recorded until :meth:`stop`, once. A trace is not worth a training: a failure is told, not raised."""
        if not self._recorded:
            return
        first, last = self._recorded[0], self._recorded[-1]
        self._recorded = []
        temporary = self._path.with_name("tmp." + self._path.name)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(temporary))
            os.replace(temporary, self._path)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            self._say(f"warning: {self._path}: the trace of steps {first} to {last} cannot be written: {error}")
        else:
            self._say(f"trace of steps {first} to {last}: {self._path}")
        # Lets go of the events, which fill memory.
        self._profile = torch.profiler.profile()

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        self.write()
