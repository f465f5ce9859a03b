"""How fast a run goes: seconds by phase, pairs, tokens and floating point operations per second, padding, memory."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_rmipo.data.batches.batch_builder import RankBatch
from megatron_rmipo.memory.peak import peak_memory_bytes
from megatron_rmipo.reports.timers import PHASES


class Throughput:
    """Adds up steps between two log lines.

    Args:
        world_size: ranks the work is shared by.
        peak_flops: of one device at the run's dtype, per second; None where it is not known.
    """

    def __init__(self, world_size: int, peak_flops: float | None) -> None:
        self._world_size = world_size
        self._peak_flops = peak_flops
        self._clear()

    def _clear(self) -> None:
        self._seconds = self._flops = 0.0
        self._phases: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._steps = self._pairs = self._tokens = self._padding = self._row_tokens = 0

    def add(self, batch: RankBatch, seconds: float, phases: Mapping[str, float]) -> None:
        """Count one step on this rank.

        Args:
            batch: its cost is in model FLOPs, see :mod:`megatron_rmipo.model.flops`.
            seconds: of the whole step.
            phases: those of its phases, see :class:`megatron_rmipo.reports.timers.PhaseTimer`.
        """
        self._steps += 1
        self._seconds += seconds
        for name, share in phases.items():
            self._phases[name] += share
        self._pairs += batch.num_pairs
        self._tokens += batch.num_tokens
        self._padding += batch.num_padding
        self._row_tokens += sum(row.num_tokens for row in batch.rows)
        self._flops += batch.cost

    def take(self) -> dict[str, float]:
        """Rates since the last call. Seconds, padding share and memory are this rank's own.

        Returns:
            ``step_seconds``; ``seconds/PHASE`` and ``seconds/other``, which add up to it (means per step); ``pairs_per_second``,
            ``tokens_per_second`` (over all ranks), ``tflops_per_device`` (model FLOPs per second and device, in 1e12), ``mfu``
            where the device's peak is known, ``padding_share``, ``memory_gib`` (peak).
        """
        seconds = max(self._seconds, 1e-9)
        flops_per_device = self._flops / seconds / self._world_size
        phases = {**self._phases, "other": self._seconds - sum(self._phases.values())}
        record = {
            "step_seconds": self._seconds / max(self._steps, 1),
            **{f"seconds/{name}": share / max(self._steps, 1) for name, share in phases.items()},
            "pairs_per_second": self._pairs / seconds,
            "tokens_per_second": self._tokens / seconds,
            "tflops_per_device": flops_per_device / 1e12,
            "padding_share": self._padding / max(self._row_tokens, 1),
            "memory_gib": peak_memory_bytes() / 2**30,
        }
        if self._peak_flops is not None:
            record["mfu"] = flops_per_device / self._peak_flops
        self._clear()
        return record
