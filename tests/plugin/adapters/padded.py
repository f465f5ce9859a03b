"""Pairs as the padded batches of other programs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_rmipo.data.store.pair_store import TokenizedPair


def preference_batch(pairs: Sequence[TokenizedPair]) -> dict[str, Tensor]:
    """As TRL's collator gives it: rows padded at the end, all chosen responses before all rejected ones."""
    rows = [(pair.prompt, getattr(pair, side)) for side in ("chosen", "rejected") for pair in pairs]
    width = max(prompt.size + response.size for prompt, response in rows) + 1
    batch = {
        name: torch.zeros(len(rows), width, dtype=torch.int64) for name in ("input_ids", "attention_mask", "completion_mask")
    }
    for row, (prompt, response) in enumerate(rows):
        size = prompt.size + response.size
        batch["input_ids"][row, :size] = torch.from_numpy(np.concatenate([prompt, response]))
        batch["attention_mask"][row, :size] = 1
        batch["completion_mask"][row, prompt.size : size] = 1
    return batch
