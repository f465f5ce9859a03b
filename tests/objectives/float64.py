"""Losses and gradients of an objective against a formula a test writes in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_rmipo.objectives.base import LossOutput, Objective, PairLogps
from tests.objectives.pairs import fresh


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The papers' letters, float64 ``[P]``: sums under policy and reference, lengths, means; and the mean chosen length."""

    lw: Tensor
    ll: Tensor
    rw: Tensor
    rl: Tensor
    nw: Tensor
    nl: Tensor
    mean_chosen_length: float

    @property
    def bar_lw(self) -> Tensor:
        return self.lw / self.nw

    @property
    def bar_ll(self) -> Tensor:
        return self.ll / self.nl

    @property
    def h(self) -> Tensor:
        return (self.lw - self.rw) - (self.ll - self.rl)

    @property
    def nll(self) -> Tensor:
        return -self.lw / self.mean_chosen_length


def numbers_of(pairs: PairLogps) -> Numbers:
    """Float64 copies; ``lw`` and ``ll`` are leaves with gradient. A reference that is not there counts as 0."""

    def double(column: Tensor | None) -> Tensor:
        return torch.zeros_like(pairs.chosen_logps).detach().double() if column is None else column.detach().double()

    return Numbers(
        lw=double(pairs.chosen_logps).requires_grad_(),
        ll=double(pairs.rejected_logps).requires_grad_(),
        rw=double(pairs.ref_chosen_logps),
        rl=double(pairs.ref_rejected_logps),
        nw=double(pairs.chosen_lengths),
        nl=double(pairs.rejected_lengths),
        mean_chosen_length=pairs.mean_chosen_length.item(),
    )


def softplus(x: float) -> float:
    """``log(1 + exp(x)) = -logsigmoid(-x)``."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def gaps_of(pairs: PairLogps, *, per_token: bool = False) -> list[float]:
    """``(Lw - Rw) - (Ll - Rl)`` of each pair, each sum divided by the response's length if ``per_token``."""
    n = numbers_of(pairs)
    gaps = (n.lw / n.nw - n.rw / n.nw) - (n.ll / n.nl - n.rl / n.nl) if per_token else n.h
    values: list[float] = gaps.detach().tolist()
    return values


def run_with_gradients(objective: Objective, pairs: PairLogps) -> tuple[LossOutput, Tensor, Tensor]:
    """Output, and the gradient of the summed losses in each chosen and each rejected log-probability."""
    pairs = fresh(pairs)
    output = objective(pairs)
    chosen, rejected = torch.autograd.grad(
        output.losses.sum(), (pairs.chosen_logps, pairs.rejected_logps), materialize_grads=True
    )
    return output, chosen, rejected


def check_against_float64(objective: Objective, pairs: PairLogps, formula: Callable[[Numbers], Tensor]) -> LossOutput:
    """Compare losses and both gradients with those of ``formula``; the output for more."""
    output, chosen, rejected = run_with_gradients(objective, pairs)
    numbers = numbers_of(pairs)
    losses = formula(numbers)
    expected = torch.autograd.grad(losses.sum(), (numbers.lw, numbers.ll), materialize_grads=True)
    torch.testing.assert_close(output.losses.detach().double(), losses.detach(), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(chosen.double(), expected[0], rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(rejected.double(), expected[1], rtol=2e-5, atol=1e-7)
    return output


def check_finite(objective: Objective, pairs: PairLogps) -> tuple[LossOutput, Tensor, Tensor]:
    """Losses, gradients and metrics are all finite, the gradients also where a norm sums their squares."""
    output, chosen, rejected = run_with_gradients(objective, pairs)
    for tensor in (output.losses, chosen.square(), rejected.square(), *output.metrics.values()):
        assert torch.isfinite(tensor).all(), tensor
    return output, chosen, rejected
