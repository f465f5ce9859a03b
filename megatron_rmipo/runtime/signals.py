"""SIGTERM and SIGINT ask a run to save and stop after the step at hand; all ranks agree on when."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from megatron_rmipo.runtime.groups import ProcessGroups, current_device


class StopRequest:
    """Catches SIGTERM and SIGINT while it is entered.

    Further signals change nothing: a Ctrl-C reaches each rank twice, from the terminal and from torchrun.

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

    def requested(self) -> bool:
        """Whether any rank has received a signal. All ranks call it together."""
        flag = torch.tensor(int(self._received), device=current_device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._groups.world)
        return bool(flag.item())
