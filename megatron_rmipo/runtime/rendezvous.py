"""Where ranks meet before they train: they compare what each is about to run, and one that failed ends all of them.

They meet in the store that torch.distributed is then connected through, since process groups cannot be made by ranks that
disagree about them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from megatron_rmipo import errors
from megatron_rmipo.errors import ConfigError, RmipoError
from megatron_rmipo.runtime.agreement import describe_difference, digest_of
from megatron_rmipo.torchrun import read_launch

# Of this process: a store may outlive the process groups that were made through it. All ranks count alike.
_MEETINGS = itertools.count(1)
# The first rank says who is missing; the others wait a little longer than it does, to hear that.
_MARGIN_SECONDS = 5.0
_PARTING_SECONDS = 3.0


class Rendezvous:
    """Where the ranks of a run meet. A context manager around all that comes before training, entered by every rank.

    What a rank raises before the ranks are connected is raised by all of them, where they meet next, as a fault of that rank.

    Args:
        timeout_minutes: how long a rank waits for the others; may be set later, when the flags are read.

    Attributes:
        launch: this process's place among the ranks.
        timeout_minutes: as given.

    Raises:
        ConfigError: torchrun's environment is incomplete.
    """

    def __init__(self, timeout_minutes: float = 10.0) -> None:
        self.launch = read_launch()
        self.timeout_minutes = timeout_minutes
        self._store: Any = None
        self._is_over = False
        self._place = ""
        self._looked: dict[str, Any] = {}

    def __enter__(self) -> Rendezvous:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, Exception) or self._is_over or self.launch.world_size == 1:
            return
        try:
            self._meet({}, (type(error).__name__, str(error)))
        except RmipoError as shared:
            # A fault of ours keeps its own traceback.
            if isinstance(error, RmipoError):
                raise shared from error

    def connect(self) -> Any:
        """The store to connect torch.distributed through. From here on a rank that fails does so in a collective.

        Raises:
            RmipoError: the first rank is not met in time.
        """
        self._is_over = True
        return self._opened()

    def _opened(self) -> Any:
        if self._store is None:
            self._store = self._open()
        return self._store

    def compare(self, facts: Mapping[str, Any]) -> None:
        """Go on only if all ranks are about to run the same. All ranks call it together.

        Args:
            facts: what to compare, by a name that a user knows; plain values. What the others follow from comes first.

        Raises:
            ConfigError: on every rank: the first fact in which two ranks differ, with both values, and how many more do.
            RmipoError: on every rank, of the kind that it was: another rank failed before it came here; or a rank did not come.
        """
        if self.launch.world_size > 1:
            self._meet(facts, None)

    def look_once(self, name: str, look: Callable[[], Any]) -> Any:
        """What ``look`` finds on the disk, looked for by one of the ranks that see the same files, and told to the others.

        Ranks of a host that work in the same directory see the same; each host looks for itself, so that :meth:`compare` finds
        in what hosts differ. All ranks of a host come here after they have compared what they were told. What was looked for
        once is remembered; what was not, once the ranks are connected, each rank looks for by itself.

        Args:
            name: of what is looked for, the same on all ranks.
            look: what finds it; plain values, as JSON holds them.

        Raises:
            RmipoError: of the kind that it was: the rank that looked met a fault; or it did not answer in time.
        """
        if name not in self._looked:
            alone = self.launch.world_size == 1 or self._is_over or not self._place
            self._looked[name] = look() if alone else self._look_or_hear(name, look)
        return self._looked[name]

    def _look_or_hear(self, name: str, look: Callable[[], Any]) -> Any:
        key = f"looked/{digest_of({'name': name, **_view_of_files()})}"
        with self._lost_ranks_named():
            looks = self._store.add(f"{self._place}/{key}/ranks", 1) == 1
        if looks:
            failure, told = None, "null"
            try:
                told = json.dumps(look(), default=str)
                return json.loads(told)
            except BaseException as error:
                failure = type(error).__name__, str(error)
                raise
            finally:
                with self._lost_ranks_named():
                    self._store.set(f"{self._place}/{key}", json.dumps([failure, json.loads(told)]))
        with self._lost_ranks_named():
            try:
                self._store.wait([f"{self._place}/{key}"], datetime.timedelta(minutes=self.timeout_minutes))
            except dist.DistStoreError:
                raise RmipoError(
                    f"the rank of {socket.gethostname()} that looks for the others of its host did not tell what it found of "
                    f"{name} within {self.timeout_minutes:g} minutes (--distributed-timeout-minutes); what it wrote may say why."
                ) from None
            failure, found = json.loads(self._store.get(f"{self._place}/{key}"))
        if failure is not None:
            kind, text = failure
            raise getattr(errors, kind, RmipoError)(text if hasattr(errors, kind) else f"{kind}: {text}")
        return found

    def _meet(self, facts: Mapping[str, Any], failure: tuple[str, str] | None) -> None:
        """Compare ``facts``, or tell a failure (kind, text). Returns if nobody failed and nothing differs."""
        # Whatever goes wrong in a meeting is not told in another.
        was_over, self._is_over = self._is_over, True
        place = self._place = f"megatron_rmipo/meeting{next(_MEETINGS)}"
        own = _Arrival(socket.gethostname(), digest_of(facts), failure)
        with self._lost_ranks_named():
            store = self._opened()
            # Once for each that differ: a thousand ranks tell the same.
            if store.add(f"{place}/ranks/{own.digest}", 1) == 1:
                store.set(f"{place}/facts/{own.digest}", json.dumps(dict(facts), default=str))
            store.set(f"{place}/rank{self.launch.rank}", json.dumps(dataclasses.asdict(own)))
            if self.launch.rank == 0:
                store.set(f"{place}/verdict", json.dumps(self._judge(place)))
            self._wait(place, ["verdict"], _MARGIN_SECONDS if self.launch.rank else 0.0)
            verdict = json.loads(store.get(f"{place}/verdict"))
        if verdict is not None:
            self._part(place)
            kind, text = verdict
            raise getattr(errors, kind, RmipoError)(text)
        self._is_over = was_over

    def _judge(self, place: str) -> tuple[str, str] | None:
        """(kind of error, text) that ends all ranks, or None. On the first rank, which looks at all the others."""
        ranks = range(self.launch.world_size)
        names = [f"rank{rank}" for rank in ranks]
        try:
            self._wait(place, names, 0.0)
        except RmipoError as error:
            return type(error).__name__, str(error)
        arrivals = [_Arrival(**json.loads(text)) for text in self._store.multi_get([f"{place}/{name}" for name in names])]
        failed = [rank for rank in ranks if arrivals[rank].failure is not None]
        if failed:
            return _shared_failure(arrivals, failed)
        other = next((rank for rank in ranks if arrivals[rank].digest != arrivals[0].digest), None)
        if other is None:
            return None
        here, there = (json.loads(self._store.get(f"{place}/facts/{arrivals[rank].digest}")) for rank in (0, other))
        return ConfigError.__name__, describe_difference(
            here, there, f"rank 0 ({arrivals[0].host})", f"rank {other} ({arrivals[other].host})"
        )

    def _wait(self, place: str, names: list[str], margin_seconds: float) -> None:
        timeout = datetime.timedelta(minutes=self.timeout_minutes, seconds=margin_seconds)
        try:
            self._store.wait([f"{place}/{name}" for name in names], timeout)
        except dist.DistStoreError:
            absent = [rank for rank in range(self.launch.world_size) if not self._store.check([f"{place}/rank{rank}"])]
            named = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
            raise RmipoError(
                f"rank {named} of {self.launch.world_size} did not come to the start of the run within {self.timeout_minutes:g} "
                "minutes (--distributed-timeout-minutes); what it wrote may say why. Nothing was started."
            ) from None

    def _part(self, place: str) -> None:
        # Together: the first rank may hold the store, and torchrun ends all ranks of a host once one has left.
        deadline = time.monotonic() + _PARTING_SECONDS
        with contextlib.suppress(RuntimeError):
            present = self._store.add(f"{place}/parted", 1)
            while present < self.launch.world_size and time.monotonic() < deadline:
                time.sleep(0.02)
                present = self._store.add(f"{place}/parted", 0)

    def _open(self) -> Any:
        if self.launch.world_size == 1:
            return dist.HashStore()  # type: ignore[attr-defined]
        timeout = datetime.timedelta(minutes=self.timeout_minutes)
        with self._lost_ranks_named():
            meeting = dist.rendezvous("env://", self.launch.rank, self.launch.world_size, timeout=timeout)  # type: ignore[attr-defined]
            store, _, _ = next(iter(meeting))
            store.set_timeout(timeout)
        if self.launch.restarts:
            # With --master-addr torchrun keeps its store, and all that was said there before the ranks were started anew.
            store = dist.PrefixStore(f"restart{self.launch.restarts}", store)  # type: ignore[attr-defined]
        return store

    @contextlib.contextmanager
    def _lost_ranks_named(self) -> Iterator[None]:
        try:
            yield
        except dist.DistError as error:
            raise RmipoError(
                f"the {self.launch.world_size} ranks did not all meet at MASTER_ADDR:MASTER_PORT {self.launch.address} within "
                f"{self.timeout_minutes:g} minutes (--distributed-timeout-minutes), or one was lost there: "
                f"{str(error).splitlines()[0].rstrip('.')}. Nothing was started. Look at what the other ranks wrote, and whether "
                "that address is the first host's and can be reached from here."
            ) from error


def _view_of_files() -> dict[str, Any]:
    """What decides which files a process means by a path, by name: a container may share its host's name, and not its files."""
    mounts = Path("/proc/self/ns/mnt")
    seen = os.readlink(mounts) if mounts.is_symlink() else ""
    return {"host": socket.gethostname(), "mounts": seen, "directory": os.getcwd()}


@dataclasses.dataclass(frozen=True)
class _Arrival:
    """What the first rank reads of each: where it runs, a digest of its facts, and its failure (kind, text) if it failed."""

    host: str
    digest: str
    failure: tuple[str, str] | None


def _shared_failure(arrivals: list[_Arrival], failed: list[int]) -> tuple[str, str]:
    kind, text = arrivals[failed[0]].failure or ("", "")
    if len(failed) == len(arrivals) and len({arrival.failure[1] for arrival in arrivals if arrival.failure}) == 1:
        return kind, text
    # A name that is no error of ours is told with the text.
    named = text if hasattr(errors, kind) else f"{kind}: {text}"
    more = f" ({len(failed) - 1} more ranks failed as well)" if len(failed) > 1 else ""
    return kind, f"rank {failed[0]} ({arrivals[failed[0]].host}) cannot start, so no rank does: {named}{more}"
