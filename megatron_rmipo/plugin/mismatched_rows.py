"""Prompts with responses to other prompts of the same global batch, for loops that know no data set.

Shape letters: B rows, S tokens of a row, P pairs (B / 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rmipo.data.store.in_memory import PairsInMemory
from megatron_rmipo.data.store.mismatch import MismatchedStore
from megatron_rmipo.data.store.pair_store import TokenizedPair
from megatron_rmipo.plugin.response_rows import ResponseRows, RowOrder


def mismatched_pairs(pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """Each prompt with the responses of a pair that follows it and has another prompt, cut as a data set's are.

    Raises:
        DataError: all prompts are the same.
    """
    store: Any = PairsInMemory([(pair.prompt, pair.chosen, pair.rejected) for pair in pairs], "the batch of a step")
    mismatched = MismatchedStore(store)
    return [mismatched[row] for row in range(len(pairs))]


def tokenized_pairs(token_ids: Tensor, attended: Tensor, response: Tensor, *, order: RowOrder) -> list[TokenizedPair]:
    """The pairs of padded rows.

    Args:
        token_ids: int64 ``[B, S]``, prompts with responses.
        attended: ``[B, S]``, non-zero at tokens, 0 at padding.
        response: ``[B, S]``, non-zero at the tokens of the response.
        order: of the rows.
    """
    ids, is_token, marked = (values.cpu().numpy() for values in (token_ids, attended != 0, response != 0))
    half = len(ids) // 2
    chosen = range(0, 2 * half, 2) if order == "interleaved" else range(half)
    step = 1 if order == "interleaved" else half
    return [
        TokenizedPair(ids[row][is_token[row] & ~marked[row]], ids[row][marked[row]], ids[row + step][marked[row + step]])
        for row in chosen
    ]


def padded_rows(pairs: Sequence[TokenizedPair], device: torch.device, *, order: RowOrder, multiple_of: int = 1) -> ResponseRows:
    """Rows of prompt and response, padded at the end to one length, a multiple of ``multiple_of``."""
    interleaved = [(pair.prompt, response) for pair in pairs for response in (pair.chosen, pair.rejected)]
    rows = interleaved if order == "interleaved" else interleaved[::2] + interleaved[1::2]
    width = max(prompt.size + response.size for prompt, response in rows)
    width += -width % multiple_of
    ids, attended, scored = np.zeros((len(rows), width), np.int64), *np.zeros((2, len(rows), width), bool)
    for row, (prompt, response) in enumerate(rows):
        size = prompt.size + response.size
        ids[row, :size] = np.concatenate([prompt, response])
        attended[row, :size] = True
        scored[row, max(prompt.size, 1) : size] = True
    return ResponseRows(*(torch.from_numpy(values).to(device) for values in (ids, attended, scored)))
