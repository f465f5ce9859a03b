"""Biases of experts, which Megatron's configuration allows only where no ranks share an expert.

Ranks that share one each add the bias behind its last matrix to their part of a sum, and so each a share of it.

Shape letter: H hidden.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor


class _Share(torch.autograd.Function):
    """A bias ``[H]`` by the number of ranks that add it; each sees the gradient of the whole sum, which is that of the bias."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, ranks: int) -> Tensor:
        """``[H]``."""
        return bias / ranks

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """As it comes."""
        return gradients[0], None


def with_biases(experts: Any) -> Any:
    """Megatron's spec, or partial call, of a layer's experts, with biases in both of their linear layers."""
    submodules = experts.keywords["submodules"] if isinstance(experts, partial) else experts.submodules
    linear_fc1, linear_fc2 = _biased(submodules.linear_fc1), _biased_behind_sum(submodules.linear_fc2)
    biased = dataclasses.replace(submodules, linear_fc1=linear_fc1, linear_fc2=linear_fc2)
    if isinstance(experts, partial):
        return partial(experts.func, *experts.args, **{**experts.keywords, "submodules": biased})
    return ModuleSpec(module=experts.module, params=experts.params, submodules=biased)


def _biased(linear: type) -> type:
    """A linear layer of Megatron's, or several in one, with a bias whatever it is told."""

    class Biased(linear):
        def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
            super().__init__(*args, bias=True, **kwargs)

    return Biased


def _biased_behind_sum(linear: type) -> type:
    """The same, where ranks that share an expert add up what they make, and each of them holds the whole bias."""

    class BiasedBehindSum(_biased(linear)):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            group = kwargs["tp_group"] if "tp_group" in kwargs else kwargs["pg_collection"].expt_tp
            self.num_shares = group.size()
            # The sum is what brings tokens back: this layer has none to make, where one rank holds an expert whole neither.
            self.explicit_expert_comm = True
            for name, parameter in self.named_parameters():
                if name.startswith("bias"):
                    # Other tensor-parallel ranks may hold another expert's, and those that share it have all of its gradient.
                    parameter.sequence_parallel = False
                    # So that norms of gradients count it once.
                    parameter.tensor_model_parallel = True
                    parameter.shared = group.rank() > 0

        def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
            output, bias = super().forward(*args, **kwargs)
            return output, [self._share(one) for one in bias] if isinstance(bias, list) else self._share(bias)

        def _share(self, bias: Tensor) -> Tensor:
            share: Tensor = _Share.apply(bias, self.num_shares) if self.num_shares > 1 else bias  # type: ignore[no-untyped-call]
            return share

    return BiasedBehindSum
