"""simper, slic, cpo, orpo, alpha_po: losses that need no further pass, against hand-worked numbers and float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rmipo.objectives.base import LogpNeeds
from megatron_rmipo.objectives.orpo import log_odds
from megatron_rmipo.objectives.registry import build_objective
from tests.objectives.float64 import Numbers, check_against_float64, check_finite, run_with_gradients
from tests.objectives.pairs import make_pairs, part_of, random_pairs, swapped

NAMES = ["simper", "slic", "cpo", "orpo", "alpha_po"]
LN2, LN4 = math.log(2.0), math.log(4.0)


@pytest.mark.parametrize(
    ("name", "options", "loss", "rewards"),
    [
        # Lw = -2 ln 2 over 2 tokens, p = 1/2; Ll = -3 ln 4 over 3 tokens, p = 1/4. Sums: -1.386294 and -4.158883.
        ("simper", {}, -0.25, (-LN2, -LN4)),
        ("simper", {"length_normalization": False}, 1.0 / 64.0 - 0.25, (-2.0 * LN2, -3.0 * LN4)),
        ("slic", {}, 0.2 * LN2, (-2.0 * LN2, -3.0 * LN4)),  # the margin 4 ln 2 = 2.77 is beyond 1
        ("slic", {"delta": 5.0, "slic_lambda": 0.5}, 5.0 - 4.0 * LN2 + LN2, (-2.0 * LN2, -3.0 * LN4)),
        ("cpo", {}, math.log1p(2.0**-0.4) + LN2, (-0.2 * LN2, -0.3 * LN4)),  # the margin is 0.1 * 4 ln 2
        ("cpo", {"beta": 0.5, "label_smoothing": 0.5, "sft_weight": 0.0}, 0.916291, (-LN2, -3.0 * LN2)),  # ln(5/4) + ln(4)/2
        # odds 1 and 1/3: -logsigmoid(log 3) = log(4/3)
        ("orpo", {}, LN2 + 0.1 * math.log(4.0 / 3.0), (-0.1 * LN2, -0.1 * LN4)),
        # alpha 1/2: r = 2 (1 - sqrt 2) and 2 (1 - 2); beta 1, gamma 0: z = 2 (2 - sqrt 2)
        (
            "alpha_po",
            {"beta": 1.0, "reward_alpha": 0.5, "gamma_beta_ratio": 0.0},
            math.log1p(math.exp(-2.0 * (2.0 - math.sqrt(2.0)))),
            (2.0 - 2.0 * math.sqrt(2.0), -2.0),
        ),
        # alpha -1: r = p - 1, beta 4, gamma 4 * 0.25: z = 4 (1/2 - 1/4 - 1/4) = 0
        ("alpha_po", {"beta": 4.0, "reward_alpha": -1.0}, LN2, (-2.0, -3.0)),
        # alpha 0: r = bar L, SimPO: z = 2.5 (ln 2 - 0.25)
        ("alpha_po", {"reward_alpha": 0.0}, math.log1p(math.exp(-2.5 * (LN2 - 0.25))), (-2.5 * LN2, -2.5 * LN4)),
    ],
)
def test_hand_worked_pair(name: str, options: dict[str, Any], loss: float, rewards: tuple[float, float]) -> None:
    output = build_objective(name, options)(make_pairs([-2.0 * LN2], [-3.0 * LN4], ([2], [3])))
    assert output.losses.item() == pytest.approx(loss, abs=2e-6)
    assert output.metrics["rewards/chosen"].item() == pytest.approx(rewards[0], abs=1e-6)
    assert output.metrics["rewards/rejected"].item() == pytest.approx(rewards[1], abs=1e-6)
    assert output.metrics["rewards/margins"].item() == pytest.approx(rewards[0] - rewards[1], abs=1e-6)
    assert not any(metric.requires_grad for metric in output.metrics.values())
    assert output.distributions == ("rewards/margins",)


def simper(x: Numbers) -> Tensor:
    return torch.exp(x.bar_ll) - torch.exp(x.bar_lw)


def slic(x: Numbers) -> Tensor:
    return (1.5 - x.lw + x.ll).clamp(min=0.0) - 0.3 * x.lw


def cpo(x: Numbers) -> Tensor:
    z = 0.05 * (x.lw - x.ll)
    return 0.9 * torch.log1p(torch.exp(-z)) + 0.1 * torch.log1p(torch.exp(z)) + 0.7 * x.nll


def orpo(x: Numbers) -> Tensor:
    pw, pl = torch.exp(x.bar_lw), torch.exp(x.bar_ll)
    odds_w, odds_l = pw / (1.0 - pw), pl / (1.0 - pl)
    return x.nll + 0.4 * torch.log(1.0 + odds_l / odds_w)


def alpha_po(x: Numbers) -> Tensor:
    rw, rl = (1.0 - torch.exp(x.bar_lw) ** -0.6) / 0.6, (1.0 - torch.exp(x.bar_ll) ** -0.6) / 0.6
    return torch.log1p(torch.exp(-(3.0 * (rw - rl) - 1.2)))


@pytest.mark.parametrize(
    ("name", "options", "formula"),
    [
        ("simper", {}, simper),
        ("slic", {"delta": 1.5, "slic_lambda": 0.3}, slic),
        ("cpo", {"beta": 0.05, "label_smoothing": 0.1, "sft_weight": 0.7}, cpo),
        ("orpo", {"orpo_lambda": 0.4}, orpo),
        ("alpha_po", {"beta": 3.0, "reward_alpha": 0.6, "gamma_beta_ratio": 0.4}, alpha_po),
    ],
)
def test_losses_and_gradients_agree_with_float64(name: str, options: dict[str, Any], formula: Any) -> None:
    pairs = random_pairs(31, seed=31)
    check_against_float64(build_objective(name, options), pairs, formula)


def test_simper_without_length_normalisation_agrees_with_float64_and_underflows_to_no_gradient() -> None:
    pairs = make_pairs([-0.5, -9.0, -5000.0], [-3.0, -2.0, -200.0], ([3, 7, 2000], [2, 5, 80]))
    objective = build_objective("simper", {"length_normalization": False})
    output = check_against_float64(objective, pairs, lambda x: torch.exp(x.ll) - torch.exp(x.lw))
    _, chosen, rejected = run_with_gradients(objective, pairs)
    assert (output.losses[2].item(), chosen[2].item(), rejected[2].item()) == (0.0, 0.0, 0.0)


def test_simper_reports_the_exponentials_it_compares_beside_the_rewards() -> None:
    pairs = make_pairs([-2.0 * LN2], [-3.0 * LN4], ([2], [3]))
    for options, likelihoods in (({}, (0.5, 0.25)), ({"length_normalization": False}, (0.25, 1.0 / 64.0))):
        metrics = build_objective("simper", options)(pairs).metrics
        found = metrics["likelihood/chosen"].item(), metrics["likelihood/rejected"].item()
        assert found == pytest.approx(likelihoods, rel=1e-6)


def test_alpha_po_tends_to_simpo() -> None:
    pairs = random_pairs(17, seed=32)
    simpo = build_objective("simpo", {"beta": 2.5})(pairs).losses
    torch.testing.assert_close(build_objective("alpha_po", {"reward_alpha": 0.0})(pairs).losses, simpo, rtol=0, atol=0)
    for alpha in (1e-5, -1e-5):  # 1 - p^-alpha in fp32 would have two digits left
        near = build_objective("alpha_po", {"reward_alpha": alpha})(pairs).losses
        torch.testing.assert_close(near, simpo, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("simper", {}),
        ("simper", {"length_normalization": False}),
        ("slic", {}),
        ("cpo", {"label_smoothing": 0.1}),
        ("orpo", {}),
        ("alpha_po", {}),
        ("alpha_po", {"reward_alpha": -0.5}),
        ("alpha_po", {"reward_alpha": 20.0}),
    ],
)
def test_very_long_and_very_unlikely_responses_stay_finite(name: str, options: dict[str, Any]) -> None:
    sums = ([-5000.0, -1.0, -5000.0, -5000.0], [-1.0, -5000.0, -4999.5, -5000.0])
    pairs = make_pairs(sums[0], sums[1], ([1, 1, 2000, 2000], [1, 1, 1999, 2000]))
    check_finite(build_objective(name, options), pairs)


def test_alpha_po_still_lifts_a_chosen_response_whose_power_would_overflow() -> None:
    pairs = make_pairs([-5000.0], [-1.0], ([1], [1]))
    _, chosen, rejected = check_finite(build_objective("alpha_po", {}), pairs)
    assert chosen.item() == pytest.approx(-2.5 * math.exp(30.0), rel=1e-5)
    assert rejected.item() == pytest.approx(2.5 * math.exp(0.25), rel=1e-5)


def test_turned_round() -> None:
    pairs = random_pairs(13, seed=33)
    simper = build_objective("simper", {})
    torch.testing.assert_close(simper(swapped(pairs)).losses, -simper(pairs).losses)
    for name, options in (("cpo", {"sft_weight": 0.0}), ("alpha_po", {"gamma_beta_ratio": 0.0})):
        objective = build_objective(name, options)
        straight = objective(pairs)
        difference = objective(swapped(pairs)).losses - straight.losses
        torch.testing.assert_close(difference, straight.metrics["rewards/margins"], rtol=1e-5, atol=1e-4)
    half = build_objective("cpo", {"sft_weight": 0.0, "label_smoothing": 0.5})
    torch.testing.assert_close(half(swapped(pairs)).losses, half(pairs).losses)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("simper", 0.0),
        ("slic", 1.7),  # 1 + 0.1 * 7
        ("cpo", LN2 + 7.0 / 3.0),
        ("orpo", 7.0 / 3.0 + 0.1 * LN2),
        ("alpha_po", math.log1p(math.exp(2.5 * 0.25))),
    ],
)
def test_equal_responses(name: str, loss: float) -> None:
    output, chosen, rejected = check_finite(build_objective(name, {}), make_pairs([-7.0], [-7.0], ([3], [3])))
    assert output.losses.item() == pytest.approx(loss, abs=1e-5)
    assert output.metrics["rewards/accuracies"].item() == 0.0
    assert chosen.item() < 0.0 < rejected.item()


@pytest.mark.parametrize("name", NAMES)
def test_one_token_responses(name: str) -> None:
    check_finite(build_objective(name, {}), make_pairs([-0.5, -3.0], [-2.0, -1e-3], ([1, 1], [1, 1])))


@pytest.mark.parametrize("x", [-200.0, -20.0, -3.0, -0.7, -0.01, -1e-4, -1e-5, -2e-6])
def test_log_odds_lose_no_digits(x: float) -> None:
    value = torch.tensor([x], requires_grad=True)
    odds = log_odds(value)
    (slope,) = torch.autograd.grad(odds.sum(), value)
    exact = value.item()
    assert odds.item() == pytest.approx(exact - math.log(-math.expm1(exact)), rel=2e-6)
    assert slope.item() == pytest.approx(-1.0 / math.expm1(exact), rel=2e-6)


def test_orpo_where_every_token_is_certain() -> None:
    # Sums that are 0, or that rounding left above it, on either side and on both.
    sums = ([0.0, -3.0, 0.0, 2e-6, -3.0], [-3.0, 0.0, 0.0, -1e-9, 2e-6])
    pairs = make_pairs(sums[0], sums[1], ([3, 3, 3, 3, 3], [3, 3, 3, 3, 3]))
    output, _, rejected = check_finite(build_objective("orpo", {}), pairs)
    # A certain chosen response has nothing left to pay, a certain rejected one is pushed down with the largest slope there is.
    assert output.losses[0].item() == pytest.approx(0.0, abs=1e-6)
    # 3 nats over the mean length 3, and the log-odds of exp(-1) behind those of exp(-1e-6).
    behind = (-1e-6 - math.log(-math.expm1(-1e-6))) - (-1.0 - math.log(-math.expm1(-1.0)))
    assert output.losses[1].item() == pytest.approx(1.0 + 0.1 * math.log1p(math.exp(behind)), rel=1e-5)
    assert rejected[1].item() == pytest.approx(0.1 * 1e6 / 3.0, rel=1e-3)
    assert rejected[4].item() == rejected[1].item()
    assert (output.losses[2] - 0.1 * LN2).abs() < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_may_be_cut_anywhere(name: str) -> None:
    pairs = random_pairs(11, seed=34)
    objective = build_objective(name, {})
    parts = [objective(part_of(pairs, part)).losses for part in (slice(0, 2), slice(2, 9), slice(9, 11))]
    assert torch.equal(objective(pairs).losses, torch.cat(parts))


@pytest.mark.parametrize(("name", "preference"), [("cpo", LN2), ("orpo", 0.1 * LN2)])
def test_the_likelihood_term_is_the_token_mean_of_the_global_batch(name: str, preference: float) -> None:
    # Equal responses: 8 nats over 5 tokens, not the mean of 1 and 4.
    pairs = make_pairs([-4.0, -4.0], [-4.0, -4.0], ([4, 1], [4, 1]))
    assert build_objective(name, {})(pairs).losses.mean().item() == pytest.approx(8.0 / 5.0 + preference, rel=1e-6)


def test_slics_likelihood_term_is_a_sum() -> None:
    pairs = make_pairs([-4.0, -4.0], [-90.0, -90.0], ([4, 1], [4, 1]))
    assert build_objective("slic", {})(pairs).losses.tolist() == pytest.approx([0.4, 0.4])


@pytest.mark.parametrize("name", NAMES)
def test_no_further_pass_is_needed(name: str) -> None:
    assert build_objective(name, {}).needs == LogpNeeds()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("slic", {"delta": -1.0}, ["delta", "at least 0"]),
        ("slic", {"slic_lambda": -0.1}, ["slic_lambda", "at least 0"]),
        ("slic", {"beta": 0.1}, ["'slic'", "beta", "delta, slic_lambda"]),
        ("slic", {"sft_weight": 0.1}, ["'slic' has no option sft_weight", "slic_lambda"]),
        ("cpo", {"beta": -1}, ["beta", "greater than 0"]),
        ("cpo", {"label_smoothing": 0.7}, ["label_smoothing", "at least 0 and at most 0.5"]),
        ("cpo", {"sft_weight": math.nan}, ["sft_weight", "nan"]),
        ("cpo", {"cpo_alpha": 1.0}, ["'cpo'", "cpo_alpha", "sft_weight"]),
        ("simper", {"length_normalization": 0}, ["length_normalization", "true or false"]),
        ("simper", {"beta": 2.0}, ["'simper'", "beta", "length_normalization"]),
        ("orpo", {"orpo_lambda": 0.0}, ["orpo_lambda", "greater than 0"]),
        ("orpo", {"beta": 0.1}, ["'orpo'", "beta", "orpo_lambda"]),
        ("alpha_po", {"reward_alpha": math.inf}, ["reward_alpha", "finite"]),
        ("alpha_po", {"beta": 0.0}, ["beta", "greater than 0"]),
        ("alpha_po", {"gamma_beta_ratio": -1.0}, ["gamma_beta_ratio", "at least 0"]),
        ("alpha_po", {"label_smoothing": 0.1}, ["'alpha_po'", "label_smoothing", "reward_alpha"]),
    ],
)
def test_options_that_cannot_work_are_refused(name: str, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=words[0]) as error:
        build_objective(name, options)
    assert all(word in str(error.value) for word in words), error.value
