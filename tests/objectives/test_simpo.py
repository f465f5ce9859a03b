"""SimPO against numbers worked by hand, the logistic gradient, and the split of a batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_rmipo.objectives.simpo import Simpo, SimpoConfig
from tests.objectives.pairs import make_pairs, part_of, random_pairs, swapped


def test_hand_worked_pair() -> None:
    # bar Lw = -2, bar Ll = -2.5, beta 2: margin 1, gamma 2 * 0.25 = 0.5.
    output = Simpo()(make_pairs([-6.0], [-10.0], ([3], [4])))
    assert output.losses.item() == pytest.approx(0.474076984, abs=1e-6)  # log(1 + exp(-0.5))
    assert output.metrics["rewards/margins"].item() == pytest.approx(1.0)
    assert output.metrics["rewards/chosen"].item() == pytest.approx(-4.0)


def test_smoothing_and_sft_term() -> None:
    output = Simpo(SimpoConfig(label_smoothing=0.2, sft_weight=0.5))(make_pairs([-6.0], [-10.0], ([3], [4])))
    expected = 0.8 * math.log1p(math.exp(-0.5)) + 0.2 * math.log1p(math.exp(0.5)) + 0.5 * 2.0
    assert output.losses.item() == pytest.approx(expected, rel=1e-6)


def test_gradient() -> None:
    pairs = random_pairs(19, seed=2)
    output = Simpo(SimpoConfig(beta=2.5, gamma_beta_ratio=0.4))(pairs)
    output.losses.sum().backward()
    slope = -2.5 * torch.sigmoid(-(output.metrics["rewards/margins"].double() - 1.0))
    assert pairs.chosen_logps.grad is not None
    assert pairs.rejected_logps.grad is not None
    torch.testing.assert_close(pairs.chosen_logps.grad.double(), slope / pairs.chosen_lengths, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(pairs.rejected_logps.grad.double(), -slope / pairs.rejected_lengths, rtol=1e-5, atol=1e-7)


def test_without_length_normalisation_rewards_and_margin_are_sums() -> None:
    # Lw = -6, Ll = -7, beta 2: margin 2, gamma 2 * 0.25 = 0.5. Rewards -12 and -14.
    pairs = make_pairs([-6.0], [-7.0], ([3], [4]))
    output = Simpo(SimpoConfig(length_normalization=False))(pairs)
    output.losses.sum().backward()
    assert output.losses.item() == pytest.approx(math.log1p(math.exp(-1.5)), rel=1e-6)
    assert output.metrics["rewards/chosen"].item() == pytest.approx(-12.0)
    assert output.metrics["rewards/margins"].item() == pytest.approx(2.0)
    assert pairs.chosen_logps.grad is not None
    assert pairs.chosen_logps.grad.item() == pytest.approx(-2.0 / (1.0 + math.exp(1.5)), rel=1e-6)


def test_without_a_margin_the_two_orders_differ_by_the_reward_difference() -> None:
    pairs = random_pairs(13, seed=4)
    objective = Simpo(SimpoConfig(gamma_beta_ratio=0.0))
    straight, turned = objective(pairs), objective(swapped(pairs))
    # -log s(-z) - (-log s(z)) = z
    torch.testing.assert_close(turned.losses - straight.losses, straight.metrics["rewards/margins"], rtol=1e-5, atol=1e-5)


def test_sft_term_is_the_token_mean_of_the_global_batch_however_it_is_cut() -> None:
    pairs = random_pairs(11, seed=8)
    objective = Simpo(SimpoConfig(sft_weight=1.0))
    plain = Simpo(SimpoConfig())
    whole = (objective(pairs).losses - plain(pairs).losses).mean()
    torch.testing.assert_close(whole, -pairs.chosen_logps.sum() / pairs.chosen_lengths.sum(), rtol=1e-5, atol=1e-6)
    total = torch.zeros(())
    for part in (slice(0, 3), slice(3, 10), slice(10, 11)):
        total = total + objective(part_of(pairs, part)).losses.sum()
    torch.testing.assert_close(total / 11, objective(pairs).losses.mean(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"beta": -1.0},
        {"gamma_beta_ratio": -0.1},
        {"label_smoothing": math.inf},
        {"sft_weight": True},
        {"length_normalization": "off"},
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SimpoConfig(**options)
