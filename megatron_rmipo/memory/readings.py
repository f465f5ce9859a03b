"""Memory that ran out: how it shows, in which pack, how much there was, and how much is free once the pack is gone."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import re
import resource
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from megatron_rmipo.data.batches.padding import Row

# Allocations and releases that --record-memory-history keeps, the latest ones.
HISTORY_ENTRIES = 100_000
# What torch's CPU allocator says; it has no error of its own type.
_CPU_MESSAGE = "DefaultCPUAllocator: can't allocate memory"
_ASKED = re.compile(r"[Tt]ried to allocate ([0-9.]+) (bytes|[KMG]iB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class PackOutOfMemory(RuntimeError):
    """Memory ran out while a pass over packs ran; what torch raised is its cause.

    Args:
        name: of the pass.
        rows: its packs, on the CPU.
        number: the one at work, from 0.
        backward: whether the pass has a backward.
        in_backward: whether that pack was in it.
        mixed: whether its logits are mixed with a reference's.
    """

    def __init__(self, name: str, rows: Sequence[Row], number: int, *, backward: bool, in_backward: bool, mixed: bool) -> None:
        super().__init__(f"out of memory in the {name}, pack {number + 1} of {len(rows)}")
        self.name, self.rows, self.number = name, rows, number
        self.backward, self.in_backward, self.mixed = backward, in_backward, mixed


@dataclasses.dataclass(frozen=True)
class MemoryReading:
    """Bytes at the moment that memory ran out; None where nobody tells.

    Attributes:
        asked: what was asked for.
        in_use: by tensors.
        reserved: of the device by torch, what is in use among it.
        free: of the device.
        total: of the device.
    """

    asked: int | None = None
    in_use: int | None = None
    reserved: int | None = None
    free: int | None = None
    total: int | None = None


class MemoryWitness:
    """Reads the device's memory, and writes a snapshot of it, at the moment that it runs out. Without CUDA it does nothing.

    Args:
        snapshot: where to; None: no snapshot.
        record_history: also keep where each piece was allocated, from now on.
    """

    def __init__(self, snapshot: Path | None, *, record_history: bool = False) -> None:
        self.snapshot = snapshot
        self.snapshot_written = False
        self.reading: MemoryReading | None = None
        if not torch.cuda.is_available():
            return
        if record_history:
            torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES)
        # Afterwards the tensors of the pass that failed are on their way out.
        bindings: Any = torch._C
        bindings._cuda_attach_out_of_memory_observer(self.observe)

    def observe(self, device: int, asked: int, total: int, free: int) -> None:
        """Called by torch's allocator just before it raises; must not raise itself."""
        with contextlib.suppress(Exception):
            in_use, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
            self.reading = MemoryReading(asked, in_use, reserved, free, total)
            if self.snapshot is not None:
                self.snapshot.parent.mkdir(parents=True, exist_ok=True)
                dump: Any = torch.cuda.memory._dump_snapshot
                dump(str(self.snapshot))
                self.snapshot_written = True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of the device or of the host."""
    known = isinstance(error, torch.OutOfMemoryError | PackOutOfMemory)
    return known or (isinstance(error, RuntimeError) and _CPU_MESSAGE in str(error))


def asked_bytes(error: BaseException) -> int | None:
    """How much was asked for, where the message of torch's allocator tells."""
    found = _ASKED.search(str(error))
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def release(error: BaseException) -> None:
    """Let go of the tensors that the frames of an error, and of its causes, hold. Its traceback can still be shown."""
    part: BaseException | None = error
    while part is not None:
        traceback.clear_frames(part.__traceback__)
        part = part.__cause__ or part.__context__
    gc.collect()


def free_bytes() -> int:
    """What tensors could take now: of the device, what torch has reserved and does not use included; of the host without one."""
    if torch.cuda.is_available():
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0]) + unused
    available: int = psutil.virtual_memory().available
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        available = min(available, limit - psutil.Process().memory_info().vms)
    return max(available, 0)


def optimizer_has_state(optimizer: Any) -> bool:
    """Whether Megatron's optimizer holds its moments already; they come with the first update."""
    return all(part.optimizer.state for part in getattr(optimizer, "chained_optimizers", [optimizer]))
