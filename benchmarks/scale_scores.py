"""What a rank spends on the reference's log-probs of a large data set before its first step, and on reading those of a batch."""

from __future__ import annotations

import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_rmipo.data.batches.seen import SeenPairs, seen_rows
from megatron_rmipo.data.store.reference_scores import SCORES_FILE, KeptScores, ScoreKey, ScoreWriter, open_scores
from megatron_rmipo.data.store.row_set import RowSet

_KEY = ScoreKey("data", "tokenizer", "reference", "float32", "matched")
_CHUNK = 1 << 18
_STRIDE = 982_451_653  # a prime: pairs of a run stand all over the data


def score_figures(num_rows: int = 60_000_000, share_seen: float = 0.1, batch_size: int = 1024) -> dict[str, float]:
    """Costs by name, ``_cpu_seconds`` and ``_private_bytes`` (most arrays at a time; mapped files are everybody's) of each.

    ``first_rank_all_there``: finds that nothing is missing. ``first_rank_none_there``: finds what is missing, where a run sees
    ``share_seen`` of the rows; which pairs those are is not counted. ``other_rank``: opens. ``batch``: reads the scores of a
    batch. ``blocks``: a rank that scores takes all missing rows, 512 at a time. ``write``: the first rank writes 512 of them.
    Beside them ``told_bytes``, what the first rank tells each other one, and ``bytes_on_disk`` before anything is scored. Needs 8
    bytes of disk a row.

    Args:
        num_rows: of the data set.
        share_seen: by the run.
        batch_size: global.
    """
    with tempfile.TemporaryDirectory() as folder:
        whole, empty = Path(folder) / "whole", Path(folder) / "empty"
        with ScoreWriter(empty, _KEY, num_rows), ScoreWriter(whole, _KEY, num_rows) as writer:
            for first in range(0, num_rows, _CHUNK):
                rows = np.arange(first, min(first + _CHUNK, num_rows))
                writer.write(rows, np.full((len(rows), 2), -300.0, dtype=np.float32))
        seen = _seen(num_rows, int(share_seen * num_rows))
        batch = np.random.default_rng(0).integers(0, num_rows, batch_size)
        scores, missing = _open(whole, num_rows), _missing(empty, seen, num_rows)
        calls: dict[str, Callable[[], Any]] = {
            "first_rank_all_there": lambda: _open(whole, num_rows).unscored(),
            "first_rank_none_there": lambda: _missing(empty, seen, num_rows),
            "other_rank": lambda: _open(whole, num_rows),
            "batch": lambda: scores[batch],
            "blocks": lambda: sum(len(block) for block in missing.blocks(512)),
        }
        figures = {name: value for what, call in calls.items() for name, value in _costs(what, call).items()}
        figures["bytes_on_disk"] = (empty / SCORES_FILE).stat().st_blocks * 512
        with ScoreWriter(empty, _KEY, num_rows) as writer:
            block = next(missing.blocks(512))
            figures |= _costs("write", lambda: writer.write(block, np.full((len(block), 2), -300.0, dtype=np.float32)))
        return {**figures, "told_bytes": missing.bits.nbytes, "rows_scored": len(missing)}


def _open(directory: Path, num_rows: int) -> KeptScores:
    scores = open_scores(directory, _KEY, num_rows)
    assert scores is not None
    return scores


def _missing(directory: Path, seen: SeenPairs, num_rows: int) -> RowSet:
    return _open(directory, num_rows).unscored() & seen_rows([seen])["pairs"]


def _seen(num_rows: int, num_seen: int) -> SeenPairs:
    """Pairs of one pretended data set whose rows they are themselves, as an order that jumps gives them."""

    def chunks() -> Iterator[np.ndarray]:
        for first in range(0, num_seen, _CHUNK):
            yield np.arange(first, min(first + _CHUNK, num_seen)) * _STRIDE % num_rows

    pairs: Any = SimpleNamespace(stores=[_Store(num_rows)], rows_of=lambda indices: (np.zeros_like(indices), indices))
    return SeenPairs(pairs, chunks)


class _Store:
    prefix = "pairs"

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows


def _costs(what: str, call: Callable[[], Any]) -> dict[str, float]:
    started = time.process_time()
    call()
    cpu_seconds = time.process_time() - started
    # By itself, for it makes every allocation slower.
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {f"{what}_cpu_seconds": cpu_seconds, f"{what}_private_bytes": peak}
