"""Pairs as the padded batches of other programs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rmipo.data.store.pair_store import TokenizedPair
from megatron_rmipo.plugin.mismatched_rows import padded_rows
from megatron_rmipo.plugin.response_rows import RowOrder


def preference_batch(pairs: Sequence[TokenizedPair], order: RowOrder = "chosen_first") -> dict[str, Tensor]:
    """As TRL's collator gives it: rows padded at the end, all chosen responses before all rejected ones."""
    rows = padded_rows(pairs, torch.device("cpu"), order=order, multiple_of=3)
    return {"input_ids": rows.token_ids, "attention_mask": rows.attended.long(), "completion_mask": rows.scored.long()}
