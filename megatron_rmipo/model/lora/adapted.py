"""The call of a linear layer that has adapters.

Shape letters: T tokens of the row, C columns of the weight, R its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from megatron_rmipo.model.lora.low_rank import LowRank
from megatron_rmipo.model.lora.quantized import frozen_weight
from megatron_rmipo.model.lora.switch import Switch
from megatron_rmipo.model.packed_model import Replacement


class AdaptedLinear(Replacement):
    """The call of a linear layer: its own, and what the active adapter adds.

    Args:
        layer: of Megatron's, with the frozen weight.
        adapters: by name.
        switch: says which is active.
    """

    outlives_attach = True

    def __init__(self, layer: Module, adapters: Mapping[str, LowRank], switch: Switch) -> None:
        super().__init__(layer)
        self.layer, self.adapters, self.switch = layer, dict(adapters), switch

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As Megatron's layers: the output ``[T, .., R]`` of ``[T, .., C]``, and the bias where that is added later."""
        output, bias = self.behind(x, *args, **kwargs)
        adapter = self.adapters.get(self.switch.active or "")
        if adapter is None:
            return output, bias
        added = self._bias() if bias is None else None
        return adapter.adapt(_normed(self.layer, x), output, added, partial(frozen_weight, self.layer)), bias

    def _bias(self) -> Tensor | None:
        """What the output has of a bias."""
        bias: Tensor | None = getattr(self.layer, "bias", None)
        return bias if bias is not None and bias.numel() else None


class AdaptedExperts(Replacement):
    """The call of the linear layers of all experts of a rank, which is one in Transformer Engine.

    Args:
        layer: Megatron's.
        adapters: by name, of each expert.
        switch: says which is active.
    """

    outlives_attach = True

    def __init__(self, layer: Module, adapters: Mapping[str, list[LowRank]], switch: Switch) -> None:
        super().__init__(layer)
        self.adapters, self.switch = dict(adapters), switch

    def __call__(self, x: Tensor, m_splits: list[int], *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """``[T, R]`` of ``[T, C]``, whose tokens stand in the experts' order, ``m_splits`` of each."""
        output, bias = self.behind(x, m_splits, *args, **kwargs)
        adapters = self.adapters.get(self.switch.active or "")
        if adapters is None:
            return output, bias
        added = [adapter(tokens) for adapter, tokens in zip(adapters, torch.split(x, m_splits), strict=True)]
        return output + torch.cat(added), bias


def is_grouped(layer: Module) -> bool:
    """Whether it is one linear layer of all experts of a rank, of Transformer Engine's."""
    return "Grouped" in type(layer).__name__


def _normed(layer: Any, x: Tensor) -> Tensor:
    """The input of the weight: Transformer Engine has the norm before a layer inside of it."""
    weight: Tensor | None = getattr(layer, "layer_norm_weight", None)
    if weight is None:
        return x
    gamma = weight + 1 if getattr(layer, "zero_centered_gamma", False) else weight
    return F.rms_norm(x, (x.shape[-1],), gamma.to(x.dtype), layer.eps)
