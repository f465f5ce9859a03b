"""Log-probs of single tokens: of a few pairs, as text that somebody reads wants them.

Every function here is collective: all ranks of the run call it together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rmipo.data.batches.batch_builder import RankBatch
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.padding import Row
from megatron_rmipo.model.packed_model import Chunks
from megatron_rmipo.passes.rows import from_last_stage, run_rows
from megatron_rmipo.runtime.groups import ProcessGroups

# (number of the pair in its batch, 0 for the chosen and 1 for the rejected response)
Place = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class TokenLogps:
    """What a model says of each token of a response.

    Attributes:
        logps: behind the prompt.
        alone: without it; None for a first token that nothing stands before.
    """

    logps: list[float]
    alone: list[float | None]


def token_layout(layout: BatchLayout) -> BatchLayout:
    """How the pairs are laid out: as a run's are, with the responses alone beside them, and all of them on every replica."""
    alone = layout.unconditional or ("bos" if layout.bos_token_id is not None else "none")
    return dataclasses.replace(layout, dp_rank=0, dp_size=1, unconditional=alone, forward_passes=0, columns=())


@torch.no_grad()
def token_logps(model: Chunks, batch: RankBatch, groups: ProcessGroups) -> dict[Place, TokenLogps]:
    """Log-probs of every token of the batch's responses, forward only; the same on every rank.

    Args:
        model: this rank's stage of the model, or its chunks, in evaluation mode.
        batch: laid out by :func:`token_layout`.
        groups: the process groups of this rank.
    """
    found: dict[str, dict[Place, list[float]]] = {}
    for name, rows in (("logps", batch.conditional), ("alone", batch.unconditional)):
        # Brought to the host once all have run, so that no row waits for the one before.
        scored = run_rows(model, rows, lambda row, logprobs: (row, logprobs), name="pass of single tokens", backward=False)
        parts = [_by_response(row, logprobs) for row, logprobs in scored]
        found[name] = from_last_stage({place: values for part in parts for place, values in part.items()}, groups)
    told = {}
    for place, logps in found["logps"].items():
        # One fewer where nothing stands before the first.
        unscored = len(logps) - len(found["alone"][place])
        told[place] = TokenLogps(logps, [None] * unscored + found["alone"][place])
    return told


def _by_response(row: Row, logprobs: Tensor) -> dict[Place, list[float]]:
    """Of the responses that a row has, without its fillers."""
    parts: Sequence[Tensor] = torch.split(logprobs.float().cpu(), row.lengths.tolist())
    places = zip(row.pair_numbers.tolist(), row.branches.tolist(), strict=True)
    return {place: part.tolist() for place, part in zip(places, parts, strict=True) if place[0] >= 0}
