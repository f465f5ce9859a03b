"""``token_logps.jsonl``: what the model says of each token of the held-out pairs that it is surest of, and least sure of.

A line for each text of a pair of the held-out set ``set``: its prompt with ``token_ids``, then each response with ``token_ids``,
``logps`` behind the prompt and ``alone`` without it (null for a first token that nothing stands before).
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_rmipo.reports.held_out import Record
from megatron_rmipo.reports.reporter import pairs_file
from megatron_rmipo.reports.summary import read_records
from megatron_rmipo.whole_files import replace_file

TOKENS_FILE = "token_logps.jsonl"
MOST, LEAST = "most certain", "least certain"
# So many of each are shown at most.
NUM_SHOWN = 8


def choose_pairs(log_dir: Path, step: int, name: str = "") -> list[tuple[int, str]]:
    """Numbers of the held-out pairs of which the last evaluation was most and least certain, and which of both; the best first.

    Certain is a pair of much reward margin, by the objective; where it has none, one of little loss.

    Args:
        log_dir: of the run.
        step: of the evaluation; pairs of another one are not taken.
        name: of the held-out set, "" for the main one.

    Returns:
        Empty where the evaluation left no pairs.
    """
    path = log_dir / pairs_file(name)
    if not path.exists():
        return []
    scored = [(score, number) for number, pair in enumerate(read_records(path)) if (score := _certainty(pair, step)) is not None]
    count = min(NUM_SHOWN, (len(scored) + 1) // 2)
    most = heapq.nlargest(count, scored)
    least = heapq.nsmallest(min(count, len(scored) - count), scored)
    return [(number, MOST) for _, number in most] + [(number, LEAST) for _, number in least]


def _certainty(pair: Record, step: int) -> float | None:
    if pair.get("step") != step:
        return None
    margin, loss = pair.get("rewards/margins"), pair.get("loss")
    if margin is not None:
        return float(margin)
    return None if loss is None else -float(loss)


def write_tokens(log_dir: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write the file, in place of the one before, in one step.

    Raises:
        OSError: it cannot be written.
    """
    replace_file(log_dir / TOKENS_FILE, (json.dumps(line) + "\n" for line in lines))
