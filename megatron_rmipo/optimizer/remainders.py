"""fp32 weights kept as bf16 weights and the sixteen bits that these lack, as Transformer Engine's FusedAdam keeps them.

The bf16 weight is what the model computes with, so the fp32 one takes two more bytes instead of four. It is rounded half up in
its last bit: where the remainder, read as a signed number, is negative, the bf16 weight is the next one.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = 16


def joined(weights: Tensor, remainders: Tensor) -> Tensor:
    """fp32 of bf16 ``weights`` and int16 ``remainders``, of any shape."""
    high = weights.view(torch.int16).to(torch.int32) - (remainders < 0).int()
    return ((high << _BITS) | (remainders.to(torch.int32) & 0xFFFF)).view(torch.float32)


def split(main: Tensor) -> tuple[Tensor, Tensor]:
    """bf16 weights and int16 remainders of fp32 ``main``, contiguous."""
    bits = main.contiguous().view(torch.int32)
    remainders = bits.to(torch.int16)
    high = (bits >> _BITS) + (remainders < 0).int()
    return high.to(torch.int16).view(torch.bfloat16), remainders
