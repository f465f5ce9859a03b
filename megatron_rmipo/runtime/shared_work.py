"""Work that ranks do at the same time, each its share: how far all are together, whether it goes on, and when it is over.

It is told through the store that connected the ranks: one that is through with its share waits in no collective, whose timeout
would end it, and what all get done, however slowly, is what says that they live.
"""

from __future__ import annotations

import datetime
import json
import time
from typing import Literal, NamedTuple

import torch.distributed as dist

from megatron_rmipo.command import progress_bar
from megatron_rmipo.runtime.first_failure import connecting_store
from megatron_rmipo.runtime.signals import StopRequest

# Between two looks of a rank at the store.
_LOOK_SECONDS = 1.0


class Halt(NamedTuple):
    """Why work does not go on: a rank failed, was asked to stop, or has lost another one; and what it says of it."""

    kind: Literal["failed", "stopped", "lost"]
    text: str


class SharedWork:
    """Work of a group of ranks, each of which makes one and does its share. No communication but through the store.

    Args:
        name: the same on every rank, and of nothing else in the life of the store.
        group: the ranks.
        title: what the progress bar of the first rank says.
        total_bytes: what all ranks together do.
        stop: a signal that any rank receives halts the work; None where none does.
    """

    def __init__(
        self, name: str, group: dist.ProcessGroup, *, title: str, total_bytes: int, stop: StopRequest | None = None
    ) -> None:
        self._store, self._key, self._group = connecting_store(), f"megatron_rmipo/work/{name}", group
        self._stop = stop
        self._bar = progress_bar(title, total_bytes, "B", shown=group.rank() == 0)
        self._untold = 0
        self._looked = float("-inf")
        self._halt: Halt | None = None

    def add(self, num_bytes: int) -> None:
        """Count what this rank has done."""
        self._untold += num_bytes

    def halt(self, halt: Halt) -> None:
        """Tell the other ranks not to go on. What was told first counts."""
        self._halt = Halt(*json.loads(self._store.compare_set(f"{self._key}/halt", "", json.dumps(halt))))

    def goes_on(self) -> bool:
        """Whether nothing was told that halts it, as far as was known a moment ago. Asked often, it tells what was done."""
        if self._halt is None and time.monotonic() - self._looked > _LOOK_SECONDS:
            self._look()
        return self._halt is None

    def finish(self) -> Halt | None:
        """Wait until every rank of the group has called this.

        Returns:
            Why the work is not done, the same on every rank; None where it is.

        Raises:
            DistStoreError: a rank is gone: for as long as the store's timeout none that works got further.
        """
        with self._bar:
            done = self._look()
            if self._store.add(f"{self._key}/finished", 1) == self._group.size():
                # One rank judges: a signal may still come to any.
                self._store.set(f"{self._key}/verdict", json.dumps(self._told_halt()))
            patience = self._store.timeout.total_seconds()
            deadline = time.monotonic() + patience
            while not self._is_judged():
                before, done = done, self._look()
                if self._halt is not None and self._halt.kind == "lost":
                    raise dist.DistStoreError(self._halt.text)
                if done != before:
                    deadline = time.monotonic() + patience
                elif time.monotonic() > deadline:
                    raise dist.DistStoreError(f"no rank got further within {patience:.0f} seconds")
            self._look()
        verdict = json.loads(self._store.get(f"{self._key}/verdict"))
        return None if verdict is None else Halt(*verdict)

    def _look(self) -> int:
        """Tell what was done and whether a signal came, and see what the others told; bytes that all have done."""
        self._looked = time.monotonic()
        done, self._untold = self._store.add(f"{self._key}/bytes", self._untold), 0
        self._bar.update(done - self._bar.n)
        if self._halt is None and self._stop is not None and self._stop.received:
            self.halt(Halt("stopped", ""))
        self._halt = self._halt or self._told_halt()
        return int(done)

    def _told_halt(self) -> Halt | None:
        key = f"{self._key}/halt"
        return Halt(*json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _is_judged(self) -> bool:
        try:
            self._store.wait([f"{self._key}/verdict"], datetime.timedelta(seconds=_LOOK_SECONDS))
        except dist.DistStoreError:
            return False
        return True
