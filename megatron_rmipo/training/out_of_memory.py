"""An error that memory ran out, turned into one that says which pack it was and which flags would have fitted."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_rmipo.checkpoint.directory import checkpoint_path, latest_complete_iteration
from megatron_rmipo.config import Config
from megatron_rmipo.data.loader import UNCONDITIONAL_PACK_FACTOR, BatchBuilder, RankBatch
from megatron_rmipo.data.packing import PackedRow
from megatron_rmipo.errors import OutOfMemoryError
from megatron_rmipo.model.architecture import ModelArchitecture
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.training.first_failure import claim_first_failure
from megatron_rmipo.training.memory_advice import Shortage, suggestions, update_suggestions
from megatron_rmipo.training.memory_estimate import PackSize, standing_memory
from megatron_rmipo.training.memory_message import first_line, further_lines
from megatron_rmipo.training.memory_readings import (
    MemoryReading,
    MemoryWitness,
    PackOutOfMemory,
    asked_bytes,
    free_bytes,
    is_out_of_memory,
    optimizer_has_state,
    release,
)

FOLDER = "out_of_memory"


@dataclasses.dataclass(frozen=True)
class _Work:
    """What a rank was at: in words, the batch and who made it, and the optimizer whose state is to come."""

    when: str
    builder: BatchBuilder
    batch: RankBatch
    optimizer: Any


class MemoryReport:
    """Explains errors that memory ran out. Made once a run, before the model.

    Args:
        config: the flags of the run.
        arch: the model.
        groups: the process groups of this rank.
        directory: in its ``out_of_memory/`` a rank leaves what it found, with CUDA a snapshot of the memory, too; None: nowhere.
    """

    def __init__(self, config: Config, arch: ModelArchitecture, groups: ProcessGroups, directory: Path | None) -> None:
        self._config, self._arch, self._groups = config, arch, groups
        self._path = None if directory is None else directory / FOLDER / f"rank{groups.rank}.json"
        snapshot = None if self._path is None else self._path.with_suffix(".pickle")
        self._witness = MemoryWitness(snapshot, record_history=config.profiling.record_memory_history)

    @contextlib.contextmanager
    def explaining(self, when: str, builder: BatchBuilder, batch: RankBatch, optimizer: Any = None) -> Iterator[None]:
        """Around the work on a batch.

        Args:
            when: the step, or whatever it is, in words.
            builder: made the batch.
            batch: this rank's share.
            optimizer: Megatron's, whose state comes with the first update; None where there will be none.

        Raises:
            OutOfMemoryError: on a rank whose memory ran out, alone.
        """
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            release(error)
            raise self._explained(error, _Work(when, builder, batch, optimizer)) from error

    def _explained(self, error: RuntimeError, work: _Work) -> OutOfMemoryError:
        record = self._record(error, work)
        kept = self._keep(record)
        if not claim_first_failure(f"rank {self._groups.rank} ran out of memory"):
            return OutOfMemoryError(f"{first_line(record)} Another rank told of its own before, and what would help.")
        return OutOfMemoryError("\n  ".join([first_line(record), *further_lines(record), *kept, self._last_checkpoint()]))

    def _record(self, error: RuntimeError, work: _Work) -> dict[str, Any]:
        """All that is known, in plain types; sizes in bytes."""
        arch, config, dp_size = self._arch, self._config, self._groups.dp_size
        cause = error.__cause__ if isinstance(error, PackOutOfMemory) else error
        reading = self._witness.reading or MemoryReading(asked=asked_bytes(cause or error))
        standing, free = standing_memory(arch, config, dp_size), free_bytes()
        if work.optimizer is not None and not optimizer_has_state(work.optimizer):
            free = max(0, free - int(standing.optimizer))
        record = {
            "rank": self._groups.rank,
            "when": work.when,
            "error": str(cause or error).splitlines()[0],
            "memory": {**dataclasses.asdict(reading), "free_without_the_pack": free},
            "standing": dataclasses.asdict(standing),
        }
        if not isinstance(error, PackOutOfMemory):
            return {**record, "suggestions": update_suggestions(arch, config, dp_size)}
        shortage = self._shortage(error, work.batch, free)
        sizes = work.builder.layout.conditional_sizes(work.builder.pairs.lengths)
        return {
            **record,
            "pass": error.name,
            "in": "backward" if error.backward and error.forward_done else "forward",
            "pack": {"number": error.number + 1, "of": len(error.rows), **_pack_record(error.rows[error.number], work)},
            "packs_in_flight": shortage.kind["packs_in_flight"],
            "estimate": dataclasses.asdict(shortage.estimate(arch, config)),
            "suggestions": suggestions(arch, config, dp_size, shortage, max(int(sizes.tokens.max()), config.data.seq_length)),
        }

    def _shortage(self, error: PackOutOfMemory, batch: RankBatch, free: int) -> Shortage:
        row = error.rows[error.number]
        stages_from_here = self._groups.pp_size - self._groups.pp_rank
        return Shortage(
            PackSize(row.num_tokens, row.num_scored),
            error.backward,
            UNCONDITIONAL_PACK_FACTOR if _is_among(row, batch.unconditional) else 1,
            free,
            {
                "packs_in_flight": min(stages_from_here, len(error.rows)) if error.backward else 1,
                "mixed": error.mixed,
                "fused": torch.cuda.is_available(),
            },
        )

    def _keep(self, record: dict[str, Any]) -> list[str]:
        """Write the record; a line that says where it is, and the snapshot. A failure is told, not raised."""
        if self._path is None:
            return []
        temporary = self._path.with_name("tmp." + self._path.name)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, self._path)
        except OSError as error:
            return [f"{self._path}: cannot be written: {error.strerror}"]
        snapshot = self._path.with_suffix(".pickle").name
        seen = f"; memory snapshot beside it, for pytorch.org/memory_viz: {snapshot}" if self._witness.reading else ""
        return [f"all of it: {self._path}{seen}"]

    def _last_checkpoint(self) -> str:
        save = self._config.checkpoint.save
        iteration = latest_complete_iteration(Path(save)) if save is not None else None
        if save is None or iteration is None:
            return "no checkpoint was saved yet"
        return f"the checkpoint {checkpoint_path(Path(save), iteration)} is whole: go on with --load {save}"


def _is_among(row: PackedRow, rows: list[PackedRow]) -> bool:
    return any(row is other for other in rows)


def _pack_record(row: PackedRow, work: _Work) -> dict[str, Any]:
    """The pack's size, and its pairs with the tokens that each has in it."""
    pairs, layout, batch = work.builder.pairs, work.builder.layout, work.batch
    numbers = sorted({number for number in row.pair_numbers.tolist() if number >= 0})
    indices = [int(batch.pair_indices[number]) for number in numbers]
    laid_out = pairs.mismatched if _is_among(row, batch.mismatched) else pairs
    assert laid_out is not None
    lengths = laid_out.lengths[indices]
    alone = _is_among(row, batch.unconditional)
    sizes = layout.unconditional_sizes(lengths) if alone else layout.conditional_sizes(lengths)
    named = zip(indices, sizes.tokens.tolist(), strict=True)
    return {
        "tokens": row.num_tokens,
        "scored_tokens": row.num_scored,
        "pairs": [{"pair": pairs.describe(index), "tokens": tokens} for index, tokens in named],
    }
