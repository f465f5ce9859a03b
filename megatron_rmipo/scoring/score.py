"""Log-probs of a whole data set under one model, written beside the data. What is done stays done when it is stopped.

Every function here is collective: all ranks call it together.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from megatron_rmipo.data.batches.loader import BatchBuilder, BatchLayout, RankBatch
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.mismatch import MismatchedStore
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.data.store.reference_scores import (
    Kind,
    ScoreKey,
    Scores,
    ScoreWriter,
    data_fingerprint,
    open_scores,
    score_directory,
)
from megatron_rmipo.errors import DataError
from megatron_rmipo.memory.report import MemoryReport
from megatron_rmipo.model.policy import PolicyModel
from megatron_rmipo.passes.rows import scores_everywhere
from megatron_rmipo.runtime.agreement import on_first_rank
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.runtime.signals import StopRequest

# Rows of each data-parallel rank between two writes: enough to fill several packs, and little to lose.
ROWS_PER_WRITE = 64
_OPEN_TRIES = 10


@dataclasses.dataclass(frozen=True)
class ScoreTask:
    """The scores of one data set.

    Attributes:
        rows: the data set, or its prompts with the responses of other rows.
        key: what the scores depend on.
        directory: where they are kept.
    """

    rows: PairStore | MismatchedStore
    key: ScoreKey
    directory: Path

    def open(self) -> Scores:
        """The finished scores, fp32 ``[P, 2]``.

        Raises:
            DataError: they are not there, or damaged.
        """
        for _ in range(_OPEN_TRIES):
            scores = open_scores(self.directory, self.key, len(self.rows))
            if scores is not None:
                return scores
            # On a shared file system another node's files may take a moment to be seen.
            time.sleep(1.0)
        raise DataError(
            f"{self.directory}: the scores were written, but are not (all) there. Is it on a disk that all nodes share?"
        )


def plan_scores(
    rows: Sequence[PairStore | MismatchedStore], *, reference: str, bf16: bool, cache: str | None, groups: ProcessGroups
) -> list[ScoreTask]:
    """What the scores of each data set under a reference of the given fingerprint depend on, and where they lie."""
    prefixes = sorted({one.prefix for one in rows})
    fingerprints = on_first_rank(groups.world, lambda: {prefix: data_fingerprint(prefix, cache) for prefix in prefixes})
    dtype = "bfloat16" if bf16 else "float32"
    tasks = []
    for one in rows:
        kind: Kind = "mismatched" if isinstance(one, MismatchedStore) else "matched"
        key = ScoreKey(fingerprints[one.prefix], one.manifest.tokenizer.fingerprint, reference, dtype, kind)
        tasks.append(ScoreTask(one, key, score_directory(one.prefix, cache, key)))
    return tasks


def find_missing(tasks: Sequence[ScoreTask], groups: ProcessGroups) -> list[ScoreTask]:
    """Those whose scores are not all there yet; the places to write them to are made.

    Raises:
        DataError: what is there is damaged, or what is missing could not be written.
    """

    def look() -> list[int]:
        missing = []
        for number, task in enumerate(tasks):
            if open_scores(task.directory, task.key, len(task.rows)) is None:
                ScoreWriter(task.directory, task.key, len(task.rows))
                missing.append(number)
        return missing

    return [tasks[number] for number in on_first_rank(groups.world, look)]


def score_rows(
    model: PolicyModel,
    task: ScoreTask,
    layout: BatchLayout,
    groups: ProcessGroups,
    memory: MemoryReport,
    stop: StopRequest,
) -> None:
    """Compute what is missing of a data set's scores. Shows a progress bar.

    Args:
        model: this rank's part of the reference, its weights loaded.
        task: from :func:`find_missing`.
        layout: how rows are cut; the result does not depend on it.
        groups: the process groups of this rank.
        memory: explains, should memory run out.
        stop: asked before each block of rows.

    Raises:
        RunStopped: a signal came; what was scored is kept.
        DataError: a score is not finite, or the scores cannot be written.
        OutOfMemoryError: on the rank whose memory ran out, alone.
    """
    rows: Any = task.rows
    num_rows = len(rows)
    builder = BatchBuilder(PairCollection([rows]), layout)
    writer: list[ScoreWriter] = []

    def open_writer() -> int:
        writer.append(ScoreWriter(task.directory, task.key, num_rows))
        return writer[0].num_done

    num_done = on_first_rank(groups.world, open_writer)
    title = f"{task.key.kind} log-probs of {rows.prefix}"
    with stop, _progress_bar(title, num_done, num_rows, shown=groups.rank == 0) as bar:
        block = ROWS_PER_WRITE * groups.dp_size
        for first in range(num_done, num_rows, block):
            stop.check(f"{title}: {first} of {num_rows} rows are kept in {task.directory}; start again to go on with the rest.")
            indices = np.arange(first, min(first + block, num_rows))
            batch = builder.build(indices)
            with memory.explaining(f"log-probs of {rows.prefix}", builder, batch, trains=False):
                scores = _score_block(model, batch, groups)
            on_first_rank(groups.world, partial(_write, writer, scores))
            bar.update(len(indices))


@torch.no_grad()
def _score_block(model: PolicyModel, batch: RankBatch, groups: ProcessGroups) -> np.ndarray:
    model.eval()
    scores: np.ndarray = scores_everywhere(model, batch.conditional, batch.num_pairs, groups)[:, :, 0].numpy()
    return scores


def _write(writer: Sequence[ScoreWriter], scores: np.ndarray) -> None:
    writer[0].write(scores)


def _progress_bar(title: str, num_done: int, total: int, *, shown: bool) -> tqdm[Any]:
    # A log file gets a line now and then instead of one that is redrawn.
    interval = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(desc=title, initial=num_done, total=total, unit="pair", disable=not shown, mininterval=interval)
