"""An adapter put into the weights it changes, for a model that is written and not computed with any more."""

from __future__ import annotations

from typing import Any

import torch

from megatron_rmipo.model.lora.adapted import AdaptedExperts, AdaptedLinear
from megatron_rmipo.model.named_tensors import ADAPTER
from megatron_rmipo.model.packed_model import Chunks, chunks_of, unwrapped


@torch.no_grad()
def merge_adapter(model: Chunks) -> None:
    """Put the trained adapter into the model's weights, in their dtype. All ranks call it together, once.

    The sum is taken in the adapter's dtype and rounded once. The adapter stays beside them, and calls add it again.

    Args:
        model: this rank's part of an adapted model, or its chunks.
    """
    for chunk in chunks_of(model):
        for layer in unwrapped(chunk).modules():
            # By the calls and not by the children: of experts that share an adapter one alone has it as its child.
            call: Any = vars(layer).get("forward")
            weights: Any = layer
            if isinstance(call, AdaptedLinear) and ADAPTER in call.adapters:
                weights.weight.copy_(call.adapters[ADAPTER].merged(weights.weight))
            elif isinstance(call, AdaptedExperts):
                for number, adapter in enumerate(call.adapters.get(ADAPTER, [])):
                    weight = getattr(weights, f"weight{number}")
                    weight.copy_(adapter.merged(weight))
