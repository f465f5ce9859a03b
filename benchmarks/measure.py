"""Seconds, CPU seconds, counted FLOPs and peak memory of a call."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one call cost.

    Attributes:
        seconds: wall clock, the device waited for.
        cpu_seconds: of all threads of this process. On a shared machine the steadier figure where the CPU computes.
        flops: of matrix products and attention, as torch counts them: what ran, recomputation and padding included, attention as
            full squares.
        peak_bytes: most memory in use above what was in use before the call: activations, logits, temporaries.
    """

    seconds: float
    cpu_seconds: float
    flops: float
    peak_bytes: int


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """(seconds, CPU seconds) of a call."""
    _synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    _synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def counted_flops(call: Callable[[], Any]) -> float:
    """FLOPs of a call, as torch counts them; it knows attention on the GPU, its CPU kernel is added here."""
    aten = torch.ops.aten
    cpu_attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=cpu_attention) as counter:
        call()
    return float(counter.get_total_flops())


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most bytes of tensors in use during a call above those in use before it: CUDA's allocator, or torch's on the CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    # Every allocation (positive) and release (negative), in the order they happened.
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_use = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        in_use += event.nbytes()
        peak = max(peak, in_use)
    return peak


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
