"""Seconds, CPU seconds, counted FLOPs and peak memory of a call."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, sdpa_backward_flop_count, sdpa_flop_count


@dataclasses.dataclass(frozen=True)
class Spread:
    """20th, 50th and 80th percentile of repeated measurements."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The percentiles of at least one value, interpolated linearly."""
        return cls(*(float(value) for value in np.percentile(values, [20, 50, 80])))


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

    seconds: Spread
    cpu_seconds: Spread
    flops: float
    peak_bytes: int

    @property
    def time(self) -> Spread:
        """CPU seconds; with CUDA, where the CPU waits while the device computes, wall clock."""
        return self.seconds if torch.cuda.is_available() else self.cpu_seconds

    def figures(self) -> dict[str, float]:
        """Every figure by its name: ``seconds_p20`` and so on."""
        figures: dict[str, float] = {}
        for name, spread in (("seconds", self.seconds), ("cpu_seconds", self.cpu_seconds)):
            figures.update({f"{name}_{percentile}": value for percentile, value in dataclasses.asdict(spread).items()})
        return figures | {"flops": self.flops, "peak_bytes": self.peak_bytes}


def time_title() -> str:
    """What :attr:`Cost.time` is, for the head of a column."""
    return "s" if torch.cuda.is_available() else "CPU s"


def measure(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Cost]:
    """Costs of each, timed in turns so that a busy machine is busy for all of them."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(timed(call))
    costs = {}
    for name, call in calls.items():
        flops, peak = flops_and_peak(call)
        seconds, cpu_seconds = (Spread.of(values) for values in zip(*times[name], strict=True))
        costs[name] = Cost(seconds, cpu_seconds, flops, peak)
    return costs


def flops_and_peak(call: Callable[[], Any]) -> tuple[float, int]:
    """Counted FLOPs and peak bytes of one call, for neither of which its duration matters."""
    flops: list[float] = []
    peak = peak_bytes(lambda: flops.append(counted_flops(call)))
    return flops[0], peak


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """(seconds, CPU seconds) of a call."""
    _synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    _synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def counted_flops(call: Callable[[], Any]) -> float:
    """FLOPs of a call, as torch counts them; attention's CPU kernel and products added in place, which it overlooks, included."""
    aten = torch.ops.aten
    overlooked = {
        aten.addmm_: _added_product_flops,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=overlooked) as counter:
        call()
    return float(counter.get_total_flops())


def _added_product_flops(total: Any, left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    return int(addmm_flop(total, left, right))


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
