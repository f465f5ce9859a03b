"""How running out of memory is told from other errors, what is read of it, and that a failed pass can be let go of."""

from __future__ import annotations

import gc
import resource
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch

from megatron_rmipo.memory.readings import (
    MemoryReading,
    MemoryWitness,
    PackOutOfMemory,
    asked_bytes,
    free_bytes,
    is_out_of_memory,
    optimizer_has_state,
    release,
)


def real_error() -> RuntimeError:
    """Of torch's CPU allocator, asked for more than any machine has."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


def test_errors_of_both_allocators_are_known_and_others_are_not() -> None:
    assert is_out_of_memory(real_error())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(PackOutOfMemory("gradient pass", [], 0, backward=True, in_backward=False, mixed=False))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has", 5 * 2**29),
        ("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 3 has", 20 * 2**20),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12", 4096),
        ("CUDA out of memory.", None),
    ],
)
def test_what_was_asked_for_is_read_from_the_message(text: str, expected: int | None) -> None:
    assert asked_bytes(RuntimeError(text)) == expected


def test_what_was_asked_for_is_read_from_a_real_message() -> None:
    assert asked_bytes(real_error()) == 2**60


def test_tensors_of_a_failed_pass_are_let_go_of_while_its_error_is_kept() -> None:
    seen: list[Any] = []

    def inner(activations: torch.Tensor) -> None:
        loss = (activations * 2).sum()
        seen.append(weakref.ref(loss))
        raise torch.OutOfMemoryError("inner")

    def outer() -> None:
        activations = torch.ones(5, requires_grad=True)
        seen.append(weakref.ref(activations))
        try:
            inner(activations)
        except RuntimeError as error:
            raise PackOutOfMemory("gradient pass", [], 0, backward=True, in_backward=False, mixed=False) from error

    with pytest.raises(PackOutOfMemory) as caught:
        outer()
    gc.collect()
    assert all(one() is not None for one in seen)
    release(caught.value)
    assert all(one() is None for one in seen)
    assert caught.value.__traceback__ is not None
    assert str(caught.value.__cause__) == "inner"


def test_free_memory_of_the_host_is_what_the_system_and_the_limit_of_the_process_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [resource.RLIM_INFINITY]
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(vms=300))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[0] if kind == resource.RLIMIT_AS else 1, 1))
    found = []
    for limit in (resource.RLIM_INFINITY, 5000, 1200, 200):
        limits[0] = limit
        found.append(free_bytes())
    assert found == [1000, 1000, 900, 0]


def test_free_memory_of_a_device_is_what_is_free_and_what_torch_keeps_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 600)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20, 800))
    assert free_bytes() == 120


def test_the_witness_reads_and_keeps_the_moment_that_memory_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    observers: list[Any] = []
    histories: list[int] = []
    memory = SimpleNamespace(
        _record_memory_history=lambda max_entries: histories.append(max_entries),
        _dump_snapshot=lambda path: Path(path).write_text("snapshot"),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory", memory)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 60 + device)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70 + device)
    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", observers.append, raising=False)
    path = tmp_path / "logs" / "rank1.pickle"
    witness = MemoryWitness(path)
    assert histories == []
    assert witness.reading is None
    assert not witness.snapshot_written
    observers[0](1, 20, 80, 5)
    assert witness.reading == MemoryReading(asked=20, in_use=61, reserved=71, free=5, total=80)
    assert path.read_text() == "snapshot"
    assert witness.snapshot_written
    failing = MemoryWitness(path, record_history=True)
    assert len(histories) == 1
    # Torch raises its own error only if this one does not.
    memory._dump_snapshot = None
    observers[1](1, 20, 80, 5)
    assert failing.reading == witness.reading
    assert not failing.snapshot_written


def test_without_cuda_nothing_is_attached(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    witness = MemoryWitness(tmp_path / "rank0.pickle", record_history=True)
    assert witness.reading is None
    assert list(tmp_path.iterdir()) == []


def test_moments_are_there_after_the_first_update() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    inner = torch.optim.AdamW([weight])
    parts = [SimpleNamespace(optimizer=inner)]
    assert not optimizer_has_state(SimpleNamespace(chained_optimizers=parts))
    weight.grad = torch.ones(3)
    inner.step()
    assert optimizer_has_state(SimpleNamespace(chained_optimizers=parts))
    assert optimizer_has_state(parts[0])
