"""An error that memory ran out, turned into one that says which pack it was and which flags would have fitted."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_rmipo.config.schema import Config
from megatron_rmipo.data.batches.batch_builder import BatchBuilder, RankBatch
from megatron_rmipo.data.batches.batch_layout import UNCONDITIONAL_PACK_FACTOR
from megatron_rmipo.data.batches.padding import Row
from megatron_rmipo.errors import OutOfMemoryError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.memory.advice import Optimizer, Shortage, suggestions, update_suggestions
from megatron_rmipo.memory.message import first_line, further_lines
from megatron_rmipo.memory.pack import PackSize
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
from megatron_rmipo.memory.standing import standing_memory
from megatron_rmipo.runtime.first_failure import claim_first_failure
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.whole_files import replace_file

FOLDER = "out_of_memory"


@dataclasses.dataclass(frozen=True)
class _Work:
    """What a rank was at: the arguments of :meth:`MemoryReport.explaining`."""

    when: str
    builder: BatchBuilder | None
    batch: RankBatch | None
    optimizer: Any
    trains: bool


class MemoryReport:
    """Explains errors that memory ran out. Made once a run, before the model.

    Args:
        config: the flags of the run.
        arch: the model.
        groups: the process groups of this rank.
        directory: in its ``out_of_memory/`` a rank leaves what it found, with CUDA a snapshot of the memory, too; None: nowhere.
        largest_pair: finds the tokens of the largest pair of all data, which a pack has to hold; asked when memory ran out.
        latest_checkpoint: finds the checkpoint that a training could go on from now, if any.
    """

    def __init__(
        self,
        config: Config,
        arch: ModelArchitecture,
        groups: ProcessGroups,
        directory: Path | None,
        largest_pair: Callable[[], int],
        latest_checkpoint: Callable[[], Path | None],
    ) -> None:
        self._config, self._arch, self._groups = config, arch, groups
        self._latest_checkpoint = latest_checkpoint
        self._largest_pair = largest_pair
        self._path = None if directory is None else directory / FOLDER / f"rank{groups.rank}.json"
        snapshot = None if self._path is None else self._path.with_suffix(".pickle")
        self._witness = MemoryWitness(snapshot, record_history=config.profiling.record_memory_history)

    @contextlib.contextmanager
    def explaining(
        self,
        when: str,
        builder: BatchBuilder | None = None,
        batch: RankBatch | None = None,
        optimizer: Any = None,
        *,
        trains: bool = True,
    ) -> Iterator[None]:
        """Around the work on a batch, or around what comes before the first.

        Args:
            when: the step, or whatever it is, in words.
            builder: made the batch.
            batch: this rank's share.
            optimizer: Megatron's, where it is built; its moments come with the first update.
            trains: False where log-probs are made of a model that has neither gradients nor an optimizer.

        Raises:
            OutOfMemoryError: on a rank whose memory ran out, alone.
        """
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            release(error)
            raise self._explained(error, _Work(when, builder, batch, optimizer, trains)) from error

    def _explained(self, error: RuntimeError, work: _Work) -> OutOfMemoryError:
        record = self._record(error, work)
        kept = self._keep(record)
        if not claim_first_failure(f"rank {self._groups.rank} ran out of memory"):
            return OutOfMemoryError(f"{first_line(record)} Another rank told of its own before, and what would help.")
        return OutOfMemoryError("\n  ".join([first_line(record), *further_lines(record), *kept, self._how_to_go_on(work)]))

    def _record(self, error: RuntimeError, work: _Work) -> dict[str, Any]:
        """All that is known, in plain types; sizes in bytes."""
        arch, config, world_size, stage = self._arch, self._config, self._groups.world_size, self._groups.pp_rank
        cause = error.__cause__ if isinstance(error, PackOutOfMemory) else error
        reading = self._witness.reading or MemoryReading(asked=asked_bytes(cause or error))
        standing, free = standing_memory(arch, config, world_size, stage, trains=work.trains), free_bytes()
        if work.optimizer is not None and not optimizer_has_state(work.optimizer):
            free = max(0, free - int(standing.moments))
        optimizer: Optimizer = "none" if not work.trains else "unsaved" if self._latest_checkpoint() is None else "saved"
        record = {
            "rank": self._groups.rank,
            "when": work.when,
            "has_packs": work.batch is not None,
            "error": str(cause or error).splitlines()[0],
            "memory": {**dataclasses.asdict(reading), "free_without_the_pack": free},
            "standing": dataclasses.asdict(standing),
        }
        if not isinstance(error, PackOutOfMemory):
            return {**record, "suggestions": update_suggestions(arch, config, world_size, stage, optimizer)}
        shortage = self._shortage(error, work.batch, free, optimizer)
        estimate = shortage.estimate(arch, config)
        return {
            **record,
            "pass": error.name,
            "in": "backward" if error.in_backward else "forward",
            "pack": {"number": error.number + 1, "of": len(error.rows), **_pack_record(error.rows[error.number], work)},
            "packs_in_flight": estimate.packs,
            "estimate": dataclasses.asdict(estimate),
            "suggestions": suggestions(arch, config, world_size, shortage, max(self._largest_pair(), config.data.seq_length)),
        }

    def _shortage(self, error: PackOutOfMemory, batch: RankBatch | None, free: int, optimizer: Optimizer) -> Shortage:
        assert batch is not None
        row = error.rows[error.number]
        return Shortage(
            PackSize.of_row(row),
            error.backward,
            UNCONDITIONAL_PACK_FACTOR if _is_among(row, batch.unconditional) else 1,
            free,
            {
                "stage": self._groups.pp_rank,
                "num_microbatches": len(error.rows),
                "mixed": error.mixed,
                "fused": torch.cuda.is_available(),
            },
            optimizer,
        )

    def _keep(self, record: dict[str, Any]) -> list[str]:
        """Write the record; a line that says where it is, and the snapshot. A failure is told, not raised."""
        if self._path is None:
            return []
        try:
            replace_file(self._path, [json.dumps(record, indent=2) + "\n"])
        except OSError as error:
            return [f"{self._path}: cannot be written: {error.strerror}"]
        snapshot = self._path.with_suffix(".pickle").name
        seen = f"; memory snapshot beside it, for pytorch.org/memory_viz: {snapshot}" if self._witness.snapshot_written else ""
        return [f"all of it: {self._path}{seen}"]

    def _how_to_go_on(self, work: _Work) -> str:
        if not work.trains:
            return "what was scored is kept: start again"
        checkpoint = self._latest_checkpoint()
        if checkpoint is None:
            return "no checkpoint was saved yet"
        without = " --no-load-optim" if self._config.checkpoint.no_save_optim else ""
        return f"the checkpoint {checkpoint} is whole: go on with --load {checkpoint.parent}{without}"


def _is_among(row: Row, rows: list[Row]) -> bool:
    return any(row is other for other in rows)


def _pack_record(row: Row, work: _Work) -> dict[str, Any]:
    """The pack's size, and its pairs with the tokens that each has in it."""
    batch, builder = work.batch, work.builder
    assert batch is not None
    assert builder is not None
    pairs, layout = builder.pairs, builder.layout
    numbers = sorted({number for number in row.pair_numbers.tolist() if number >= 0})
    indices = [int(batch.pair_indices[number]) for number in numbers]
    laid_out = pairs.mismatched if _is_among(row, batch.mismatched) else pairs
    assert laid_out is not None
    lengths = laid_out.lengths_of(np.array(indices, dtype=np.int64))
    alone = _is_among(row, batch.unconditional)
    sizes = layout.unconditional_sizes(lengths) if alone else layout.conditional_sizes(lengths)
    named = zip(indices, sizes.tokens.tolist(), strict=True)
    return {
        "tokens": row.num_tokens,
        "scored_tokens": row.num_scored,
        "pairs": [{"pair": pairs.describe(index), "tokens": tokens} for index, tokens in named],
    }
