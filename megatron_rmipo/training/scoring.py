"""Log-probs of a whole data set under one model, written beside the data. What is done stays done when it is stopped.

Every function here is collective: all ranks call it together.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from megatron_rmipo.checkpoint.agreement import on_first_rank
from megatron_rmipo.data.collection import PairCollection
from megatron_rmipo.data.loader import BatchBuilder, BatchLayout
from megatron_rmipo.data.mismatch import MismatchedStore
from megatron_rmipo.data.pair_store import PairStore
from megatron_rmipo.data.reference_scores import ScoreKey, ScoreWriter, data_fingerprint, open_scores, score_directory
from megatron_rmipo.model.policy import PolicyModel
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.training.rows import from_last_stage, gather_pairs, score_responses

# Rows of each data-parallel rank between two writes: enough to fill several packs, and little to lose.
ROWS_PER_WRITE = 64

Kind = Literal["matched", "mismatched"]


def score_keys(stores: Sequence[PairStore], kind: Kind, *, reference: str, bf16: bool, groups: ProcessGroups) -> list[ScoreKey]:
    """The key of each data set's scores under a reference of the given fingerprint."""
    fingerprints = on_first_rank(groups.world, lambda: [data_fingerprint(store) for store in stores])
    dtype = "bfloat16" if bf16 else "float32"
    return [
        ScoreKey(fingerprint, store.manifest.tokenizer.fingerprint, reference, dtype, kind)
        for store, fingerprint in zip(stores, fingerprints, strict=True)
    ]


def are_finished(stores: Sequence[PairStore], keys: Sequence[ScoreKey], cache: str | None, groups: ProcessGroups) -> bool:
    """Whether the scores of all data sets are there."""

    def look() -> bool:
        directories = [score_directory(store.prefix, cache, key) for store, key in zip(stores, keys, strict=True)]
        found = [open_scores(*arguments) for arguments in zip(directories, keys, map(len, stores), strict=True)]
        return all(scores is not None for scores in found)

    return on_first_rank(groups.world, look)


def score_store(
    model: PolicyModel, store: PairStore, key: ScoreKey, cache: str | None, layout: BatchLayout, groups: ProcessGroups
) -> Path:
    """Compute what is missing of a data set's scores. Shows a progress bar.

    Args:
        model: this rank's part of the reference, its weights loaded.
        store: the data set.
        key: from :func:`score_keys`.
        cache: directory to write to; None: beside the data.
        layout: how rows are cut; the result does not depend on it.
        groups: the process groups of this rank.

    Returns:
        The directory of the scores.

    Raises:
        DataError: a score is not finite, or the scores cannot be written.
    """
    directory = score_directory(store.prefix, cache, key)
    rows: Any = MismatchedStore(store) if key.kind == "mismatched" else store
    builder = BatchBuilder(PairCollection([rows]), layout)
    writer: list[ScoreWriter] = []

    def open_writer() -> int:
        writer.append(ScoreWriter(directory, key, len(store)))
        return writer[0].num_done

    num_done = on_first_rank(groups.world, open_writer)
    with _progress_bar(f"{key.kind} log-probs of {store.prefix}", num_done, len(store), shown=groups.rank == 0) as bar:
        block = ROWS_PER_WRITE * groups.dp_size
        for first in range(num_done, len(store), block):
            indices = np.arange(first, min(first + block, len(store)))
            scores = _score_block(model, builder, indices, groups)
            on_first_rank(groups.world, partial(_write, writer, scores))
            bar.update(len(indices))
    return directory


@torch.no_grad()
def _score_block(model: PolicyModel, builder: BatchBuilder, indices: np.ndarray, groups: ProcessGroups) -> np.ndarray:
    batch = builder.build(indices)
    model.eval()
    scores: Any = score_responses(model, batch.conditional, batch.num_pairs)
    if groups.is_last_stage:
        scores = gather_pairs(scores, groups)[:, :, 0].numpy()
    result: np.ndarray = from_last_stage(scores, groups)
    return result


def _write(writer: Sequence[ScoreWriter], scores: np.ndarray) -> None:
    writer[0].write(scores)


def _progress_bar(title: str, num_done: int, total: int, *, shown: bool) -> tqdm[Any]:
    # A log file gets a line now and then instead of one that is redrawn.
    interval = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(desc=title, initial=num_done, total=total, unit="pair", disable=not shown, mininterval=interval)
