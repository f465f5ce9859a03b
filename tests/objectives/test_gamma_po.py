"""gamma-PO: margins against a plain loop over probabilities and the condition of a minimum, losses against float64, limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_rmipo.objectives.base import LogpNeeds
from megatron_rmipo.objectives.gamma_po import GammaPo, GammaPoConfig, dealt_margins
from megatron_rmipo.objectives.simpo import Simpo, SimpoConfig
from tests.objectives.batches import cut, gradients, with_prepared
from tests.objectives.float64 import numbers_of, softplus
from tests.objectives.pairs import make_pairs, random_pairs


def gaps_of(count: int, seed: int, scale: float = 4.0) -> Tensor:
    return scale * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_plain_loop(gaps: list[float], gamma: float, tau: float) -> list[float]:
    """The margins, on probabilities."""
    n, size = len(gaps), min(0.5 / tau, 1.0)
    p = [1.0 / n] * n
    for _ in range(20):
        slopes = [gamma / (1.0 + math.exp(gap - gamma * n * q)) for gap, q in zip(gaps, p, strict=True)]
        p = [q * math.exp(-size * (tau * (1.0 + math.log(n * q)) + slope)) for q, slope in zip(p, slopes, strict=True)]
        p = [q / sum(p) for q in p]
    return [gamma * n * q for q in p]


def test_hand_worked_pairs_by_what_a_minimum_is() -> None:
    # Where the sum cannot be lowered by moving margin between two pairs, tau log p + gamma sigmoid(gamma_i - gap) is the same.
    margins = dealt_margins(torch.tensor([3.0, -3.0], dtype=torch.float64), 1.0, 2.0)
    first, second = margins.tolist()
    assert first + second == pytest.approx(2.0)
    assert first > 1.0 > second
    balance = [2.0 * math.log(m) + 1.0 / (1.0 + math.exp(gap - m)) for m, gap in ((first, 3.0), (second, -3.0))]
    assert balance[0] == pytest.approx(balance[1], abs=1e-5)


# In the last case the steps overshoot the minimum.
@pytest.mark.parametrize(
    ("gamma", "tau", "ordered"), [(4.0, 10.0, True), (0.375, 3.0, True), (1.6, 0.4, True), (4.0, 1.0, False)]
)
def test_margins_agree_with_a_plain_loop(gamma: float, tau: float, ordered: bool) -> None:
    gaps = gaps_of(29, seed=81)
    margins = dealt_margins(gaps, gamma, tau)
    assert margins.tolist() == pytest.approx(by_plain_loop(gaps.tolist(), gamma, tau), rel=1e-9)
    assert margins.mean().item() == pytest.approx(gamma, rel=1e-12)
    # The larger the gap, the larger the margin.
    assert torch.equal(margins.argsort(), gaps.argsort()) == ordered


def test_losses_and_gradients_agree_with_float64() -> None:
    pairs = random_pairs(23, seed=82)
    objective = GammaPo(GammaPoConfig(beta=2.5, gamma_beta_ratio=0.3, tau=1.5, label_smoothing=0.13))
    output = objective(with_prepared(objective, pairs))
    n = numbers_of(pairs)
    gaps = (2.5 * (n.bar_lw - n.bar_ll)).tolist()
    margins = by_plain_loop(gaps, 0.75, 1.5)
    logits = [gap - margin for gap, margin in zip(gaps, margins, strict=True)]
    assert output.metrics["gamma"].tolist() == pytest.approx(margins, rel=1e-5)
    assert output.losses.tolist() == pytest.approx([0.87 * softplus(-z) + 0.13 * softplus(z) for z in logits], rel=2e-5)
    # No gradient flows through the margin.
    output.losses.sum().backward()
    slopes = torch.tensor([2.5 * (0.13 - 1.0 / (1.0 + math.exp(z))) for z in logits], dtype=torch.float64)
    chosen, rejected = gradients(pairs)
    torch.testing.assert_close(chosen, slopes / n.nw, rtol=3e-5, atol=1e-7)
    torch.testing.assert_close(rejected, -slopes / n.nl, rtol=3e-5, atol=1e-7)


@pytest.mark.parametrize("count", [1, 5])
def test_equal_gaps_are_simpo(count: int) -> None:
    pairs = make_pairs([-6.0] * count, [-10.0] * count, ([3] * count, [4] * count))
    objective = GammaPo(GammaPoConfig(beta=2.0, gamma_beta_ratio=0.25))
    output = objective(with_prepared(objective, pairs))
    torch.testing.assert_close(output.losses, Simpo(SimpoConfig(beta=2.0, gamma_beta_ratio=0.25))(pairs).losses)


def test_a_large_tau_is_simpo() -> None:
    assert dealt_margins(gaps_of(17, seed=83), 4.0, 1e6).tolist() == pytest.approx([4.0] * 17, rel=1e-5)


def test_far_gaps_and_a_small_tau_stay_finite() -> None:
    margins = dealt_margins(torch.tensor([5000.0, -5000.0, 0.0], dtype=torch.float64), 400.0, 1e-3)
    assert torch.isfinite(margins).all()
    assert margins.mean().item() == pytest.approx(400.0)


def test_a_batch_may_be_cut_anywhere() -> None:
    objective = GammaPo()
    pairs = with_prepared(objective, random_pairs(11, seed=84))
    assert torch.equal(torch.cat([objective(part).losses for part in cut(pairs, 2, 9)]), objective(pairs).losses)
    assert objective.needs == LogpNeeds(batch=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.0}, "beta must be a number greater than 0"),
        ({"gamma_beta_ratio": 0.0}, "gamma_beta_ratio 0 leaves no margin to deal out; use objective simpo"),
        ({"tau": 0.0}, "tau must be a number greater than 0"),
        ({"label_smoothing": 0.6}, "label_smoothing"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GammaPoConfig(**options)
