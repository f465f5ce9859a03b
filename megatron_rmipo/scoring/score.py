"""Log-probs of rows of a data set under one model, written beside the data. What is done stays done when it is stopped.

Every function here is collective: all ranks call it together.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_rmipo.command import progress_bar
from megatron_rmipo.data.batches.batch_builder import BatchBuilder
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.padding import Row
from megatron_rmipo.data.store.alone import ResponsesAlone
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.mismatch import MismatchedStore
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.data.store.reference_scores import (
    KeptScores,
    Kind,
    ScoreKey,
    Scores,
    ScoreWriter,
    data_fingerprint,
    open_scores,
    refuse_not_finite,
    score_directory,
)
from megatron_rmipo.data.store.row_set import RowSet
from megatron_rmipo.errors import DataError
from megatron_rmipo.memory.report import MemoryReport
from megatron_rmipo.model.policy import Policy
from megatron_rmipo.passes.rows import scores_everywhere
from megatron_rmipo.runtime.agreement import on_first_rank
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.runtime.signals import RunStopped, StopRequest

# Rows of each data-parallel rank between two writes: enough to fill several packs, and little to lose.
ROWS_PER_WRITE = 64
# Writes between two flushes, where all ranks learn of a write that failed.
_WRITES_PER_FLUSH = 16
_OPEN_TRIES = 10


Rows = PairStore | MismatchedStore | ResponsesAlone


@dataclasses.dataclass(frozen=True)
class ScoreTask:
    """The scores of one data set.

    Attributes:
        rows: the data set, its prompts with the responses of other rows, or its responses alone.
        key: what the scores depend on.
        directory: where they are kept.
    """

    rows: Rows
    key: ScoreKey
    directory: Path

    def open(self) -> KeptScores:
        """The scores that there are.

        Raises:
            DataError: there are none, or they are damaged.
        """
        for _ in range(_OPEN_TRIES):
            scores = open_scores(self.directory, self.key, len(self.rows))
            if scores is not None:
                return scores
            # On a shared file system another node's files may take a moment to be seen.
            time.sleep(1.0)
        raise DataError(f"{self.directory}: the scores were written, but are not there. Is it on a disk that all nodes share?")


@dataclasses.dataclass(frozen=True)
class MissingScores:
    """What is to be computed for one data set.

    Attributes:
        task: of the data set.
        rows: those whose scores are needed and not there; at least one.
        num_needed: how many are needed, these among them.
    """

    task: ScoreTask
    rows: RowSet
    num_needed: int


def plan_scores(rows: Sequence[Rows], *, reference: str, bf16: bool, cache: str | None, groups: ProcessGroups) -> list[ScoreTask]:
    """What the scores of each data set under a reference of the given fingerprint depend on, and where they lie."""
    prefixes = sorted({one.prefix for one in rows})
    fingerprints = on_first_rank(groups.world, lambda: {prefix: data_fingerprint(prefix, cache) for prefix in prefixes})
    dtype = "bfloat16" if bf16 else "float32"
    tasks = []
    for one in rows:
        key = ScoreKey(fingerprints[one.prefix], one.manifest.tokenizer.fingerprint, reference, dtype, _kind_of(one))
        tasks.append(ScoreTask(one, key, score_directory(one.prefix, cache, key)))
    return tasks


def _kind_of(rows: Rows) -> Kind:
    if isinstance(rows, ResponsesAlone):
        return rows.kind
    return "mismatched" if isinstance(rows, MismatchedStore) else "matched"


def find_missing(
    tasks: Sequence[ScoreTask], groups: ProcessGroups, needed: Callable[[], Mapping[str, RowSet]] | None = None
) -> list[MissingScores]:
    """What is not there yet of the scores that are needed; the places to write it to are made.

    The first rank looks; the others get a bit for each row of the data sets of which something is missing.

    Args:
        tasks: the data sets.
        groups: the process groups of this rank.
        needed: gives the rows that are, by the prefix of the data set; asked once, on the first rank, where not all are scored.
            None: all rows are.

    Raises:
        DataError: what is there is damaged, or what is missing could not be written.
    """
    answers: list[Mapping[str, RowSet]] = []

    def look_at(task: ScoreTask) -> tuple[RowSet, int]:
        kept = open_scores(task.directory, task.key, len(task.rows))
        missing, num_needed = RowSet.whole(len(task.rows)) if kept is None else kept.unscored(), len(task.rows)
        if needed is not None and len(missing):
            if not answers:
                answers.append(needed())
            wanted = answers[0][task.rows.prefix]
            missing, num_needed = missing & wanted, len(wanted)
        if kept is None or len(missing):
            with ScoreWriter(task.directory, task.key, len(task.rows)):
                pass
        return missing, num_needed

    def look() -> list[tuple[int, RowSet, int]]:
        found = [(number, *look_at(task)) for number, task in enumerate(tasks)]
        return [one for one in found if len(one[1])]

    return [MissingScores(tasks[number], rows, num_needed) for number, rows, num_needed in on_first_rank(groups.world, look)]


def score_rows(
    model: Policy,
    missing: MissingScores,
    layout: BatchLayout,
    groups: ProcessGroups,
    memory: MemoryReport,
    stop: StopRequest,
    name: str | None = None,
) -> None:
    """Compute what is missing of a data set's scores, in stored order. Shows a progress bar.

    Args:
        model: this rank's part of the reference, its weights loaded.
        missing: from :func:`find_missing`.
        layout: how rows are cut; the result does not depend on it.
        groups: the process groups of this rank.
        memory: explains, should memory run out.
        stop: asked before each block of rows.
        name: what its set is called on the screen; None: by its prefix.

    Raises:
        RunStopped: a signal came; what was scored is kept.
        DataError: a score is not finite, or the scores cannot be written.
        OutOfMemoryError: on the rank whose memory ran out, alone.
    """
    task, total = missing.task, missing.num_needed
    alone = isinstance(task.rows, ResponsesAlone)
    rows: Any = task.rows
    if isinstance(task.rows, ResponsesAlone):
        rows = task.rows.store
        layout = dataclasses.replace(layout, unconditional="bos", bos_token_id=task.rows.context_token_id)
    builder = BatchBuilder(PairCollection([rows]), layout)
    name = name or rows.prefix
    title = f"{task.key.kind} log-probs of {name}"
    num_done = total - len(missing.rows)
    with (
        stop,
        _Keeper(task, groups) as keeper,
        progress_bar(title, total, "pair", shown=groups.rank == 0, num_done=num_done) as bar,
    ):
        for number, block in enumerate(missing.rows.blocks(ROWS_PER_WRITE * groups.dp_size)):
            if stop.requested():
                keeper.flush()
                kept = f"{num_done} of {total} rows are kept in {task.directory}"
                raise RunStopped(f"{title}: {kept}; start again to go on with the rest.")
            batch = builder.build(block)
            with memory.explaining(f"log-probs of {name}", builder, batch, trains=False):
                scores = _score_block(model, batch.unconditional if alone else batch.conditional, batch.num_pairs, groups)
            refuse_not_finite(task.directory, block, scores)
            keeper.write(block, scores)
            if (number + 1) % _WRITES_PER_FLUSH == 0:
                keeper.flush()
            num_done += len(block)
            bar.update(len(block))
        keeper.flush()


@torch.no_grad()
def _score_block(model: Policy, rows: Sequence[Row], num_pairs: int, groups: ProcessGroups) -> np.ndarray:
    model.eval()
    scores: np.ndarray = scores_everywhere(model, rows, num_pairs, groups)[:, :, 0].numpy()
    return scores


class _Keeper:
    """The first rank writes; that it could not, the others learn at the next flush, so that no write needs a word to them.

    A context manager, whose making is collective.
    """

    def __init__(self, task: ScoreTask, groups: ProcessGroups) -> None:
        self._group = groups.world
        self._writer: ScoreWriter | None = None
        self._failure: DataError | None = None

        def open_writer() -> None:
            self._writer = ScoreWriter(task.directory, task.key, len(task.rows))

        on_first_rank(self._group, open_writer)

    def __enter__(self) -> _Keeper:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._writer is not None:
            self._writer.__exit__(*exc)

    def write(self, rows: npt.NDArray[np.int64], scores: Scores) -> None:
        """Write scores, fp32 ``[n, 2]``, of ``rows``, which are the same on every rank."""
        if self._writer is not None and self._failure is None:
            try:
                self._writer.write(rows, scores)
            except DataError as error:
                self._failure = error

    def flush(self) -> None:
        """Return when what was written outlasts a failure of the machine. Collective.

        Raises:
            DataError: on every rank, where the first one could not write.
        """
        on_first_rank(self._group, self._flush_writer)

    def _flush_writer(self) -> None:
        assert self._writer is not None
        if self._failure is not None:
            raise self._failure
        self._writer.flush()
