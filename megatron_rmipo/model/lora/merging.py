"""An adapter put into the weights it changes, for a model that is written and not computed with any more."""

from __future__ import annotations

from typing import Any

import torch

from megatron_rmipo.model.lora.attach import low_ranks
from megatron_rmipo.model.packed_model import Chunks


@torch.no_grad()
def merge_adapter(model: Chunks) -> None:
    """Put the trained adapter into the model's weights, in their dtype. All ranks call it together, once.

    The sum is taken in the adapter's dtype and rounded once. The adapter stays beside them, and calls add it again.

    Args:
        model: this rank's part of an adapted model, or its chunks.
    """
    for full_name, layer, adapter in low_ranks(model):
        number = full_name.rpartition(".")[2]
        # One layer has the weights of all experts of a rank in Transformer Engine.
        name = f"weight{number}" if number.isdecimal() else "weight"
        weight: Any = getattr(layer, name)
        weight.copy_(adapter.merged(weight))
