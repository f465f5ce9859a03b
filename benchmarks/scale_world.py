"""A run of any number of ranks pretended in one process: its groups, its store, what a rank sends, receives and looks at."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_rmipo.runtime.cpu import install_cpu_runtime
from megatron_rmipo.runtime.groups import ProcessGroups, shutdown_runtime

RANKS_OF_A_HOST = 8


@dataclasses.dataclass(frozen=True)
class Layout:
    """How many ranks share a layer, hold stages, hold replicas, and share rows."""

    tp: int
    pp: int
    dp: int
    cp: int = 1

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.tp * self.pp * self.dp * self.cp

    @classmethod
    def of(cls, name: str) -> Layout:
        """The layout that is called TPxPPxDP, or TPxPPxDPxCP."""
        return cls(*map(int, name.split("x")))


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one stage cost a rank; None for what it does not do.

    Attributes:
        cpu_seconds: of this process.
        peak_bytes: most memory of Python and NumPy at a time.
        moved_bytes: sent and received.
        files: looks at files and folders.
        number: of what the stage makes or exchanges: groups, tensors, entries.
    """

    cpu_seconds: float
    peak_bytes: int | None = None
    moved_bytes: float | None = None
    files: float | None = None
    number: int | None = None


def cost(call: Callable[[], Any], repeats: int = 1) -> Measured:
    """CPU seconds, the least of some calls, and peak memory of one more."""
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        call()
        seconds.append(time.process_time() - started)
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return Measured(min(seconds), peak)


def cost_with_traffic(call: Callable[[], Any], repeats: int = 1) -> Measured:
    """The same, with what one call sends and receives."""
    with Traffic() as traffic:
        call()
    with Traffic():
        return dataclasses.replace(cost(call, repeats), moved_bytes=traffic.moved_bytes)


@contextlib.contextmanager
def pretended_world(layout: Layout, rank: int) -> Iterator[ProcessGroups]:
    """Megatron's process groups of one rank of many, whose collectives give this rank back what it put in."""
    install_cpu_runtime()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.ranks)
    try:
        parallel_state.initialize_model_parallel(
            layout.tp, layout.pp, context_parallel_size=layout.cp, create_gloo_process_groups=False
        )
        yield ProcessGroups.of_megatron()
    finally:
        shutdown_runtime()


class Traffic:
    """Counts what this rank sends and receives in collectives, at the least that any way to do them moves. A context manager.

    Objects travel pickled, and where a rank would get those of others it gets its own, as large as theirs.
    """

    def __init__(self) -> None:
        self.moved_bytes = 0
        self._kept: dict[str, Any] = {}

    def __enter__(self) -> Traffic:
        for name in ("all_reduce", "broadcast_object_list", "all_gather_object", "gather_object"):
            self._kept[name] = getattr(dist, name)
            setattr(dist, name, getattr(self, f"_{name}"))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self._kept.items():
            setattr(dist, name, function)

    def _all_reduce(self, tensor: Tensor, *_: Any, **__: Any) -> None:
        self.moved_bytes += 2 * tensor.numel() * tensor.element_size()

    def _broadcast_object_list(self, objects: list[Any], *_: Any, **__: Any) -> None:
        self.moved_bytes += len(pickle.dumps(objects))

    def _all_gather_object(self, objects: list[Any], own: Any, *_: Any, **__: Any) -> None:
        data = pickle.dumps(own)
        self.moved_bytes += len(data) * (len(objects) + 1)
        objects[:] = [pickle.loads(data) for _ in objects]

    def _gather_object(self, own: Any, objects: list[Any] | None = None, *_: Any, **__: Any) -> None:
        data = pickle.dumps(own)
        self.moved_bytes += len(data) * (1 if objects is None else len(objects))
        if objects is not None:
            objects[:] = [pickle.loads(data) for _ in objects]


class CountedStore:
    """A store that ranks of one process share one after the other; counts the bytes of keys and values that each moves.

    What nobody has said yet is null: the first rank, which judges, comes last.
    """

    def __init__(self) -> None:
        self.rank = 0
        self.moved_bytes: Counter[int] = Counter()
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        """As torch's."""
        self._values[key] = value.encode()
        self._count(key, self._values[key])

    def get(self, key: str) -> bytes:
        """As torch's."""
        return self.multi_get([key])[0]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """As torch's."""
        values = [self._values.get(key, b"null") for key in keys]
        self._count(*keys, *values)
        return values

    def add(self, key: str, amount: int) -> int:
        """As torch's."""
        self._values[key] = str(int(self._values.get(key, b"0")) + amount).encode()
        self._count(key, self._values[key])
        return int(self._values[key])

    def wait(self, keys: Sequence[str], *_: Any) -> None:
        """As torch's, for what is said at once."""
        self._count(*keys)

    def _count(self, *parts: str | bytes) -> None:
        self.moved_bytes[self.rank] += sum(map(len, parts))


class FileLooks:
    """Counts looks at files and folders: of their state, into folders, and openings. A context manager, one at a time."""

    _open: FileLooks | None = None
    _is_hooked = False

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> FileLooks:
        if not FileLooks._is_hooked:
            sys.addaudithook(_count_opening)  # for good: Python takes none back
            FileLooks._is_hooked = True
        self._stat = os.stat
        os.stat = self._counted_stat  # type: ignore[assignment]
        FileLooks._open = self
        return self

    def __exit__(self, *_: object) -> None:
        FileLooks._open = None
        os.stat = self._stat

    def _counted_stat(self, *args: Any, **kwargs: Any) -> os.stat_result:
        self.count += 1
        return self._stat(*args, **kwargs)


def _count_opening(event: str, _: tuple[Any, ...]) -> None:
    if FileLooks._open is not None and event in ("open", "os.scandir", "os.listdir"):
        FileLooks._open.count += 1
