"""SIGTERM and SIGINT ask a command to keep what it has and stop; all ranks agree on when."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from megatron_rmipo.runtime.groups import ProcessGroups, current_device


class RunStopped(Exception):
    """A signal ended a command before its end, on every rank; the text says what was kept and how to go on."""


class StopRequest:
    """Catches SIGTERM and SIGINT while it is entered; outside they end the process at once.

    Further signals change nothing: a Ctrl-C may reach each rank twice, from the terminal and from torchrun. It may be entered
    again, and remembers what it has received.

    Args:
        groups: ``requested`` is agreed on over all ranks.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, groups: ProcessGroups) -> None:
        self._groups = groups
        self._received = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    @property
    def received(self) -> bool:
        """Whether this rank has received a signal."""
        return self._received

    def requested(self, group: dist.ProcessGroup | None = None) -> bool:
        """Whether any rank has received a signal, of all or of a group. Its ranks call it together."""
        flag = torch.tensor(int(self._received), device=current_device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group or self._groups.world)
        return bool(flag.item())

    def check(self, text: str, group: dist.ProcessGroup | None = None) -> None:
        """Stop where a signal was received, as :meth:`requested`.

        Raises:
            RunStopped: with ``text``.
        """
        if self.requested(group):
            raise RunStopped(text)
