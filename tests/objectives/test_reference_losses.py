"""Losses of a pair's own log-ratios with a reference, against hand-worked numbers and float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rmipo.objectives.base import LogpNeeds, PairLogps
from megatron_rmipo.objectives.bounded_exp import MAX_EXPONENT, bounded_exp, bounded_expm1
from megatron_rmipo.objectives.registry import build_objective
from tests.objectives.float64 import Numbers, check_against_float64, check_finite, run_with_gradients
from tests.objectives.pairs import make_pairs, part_of, random_pairs, swapped

PAIRWISE = ["apo_zero", "apo_down", "nca_pair", "robust", "exo_pair", "sppo_hard"]
NAMES = ["dpo", "ipo", "hinge", "infopo", *PAIRWISE]
# Lw - Rw = -6 + 8 = 2 over 4 tokens, Ll - Rl = -10 + 9 = -1 over 5: h = 3.
HAND: dict[str, Any] = {"chosen": [-6.0], "rejected": [-10.0], "lengths": ([4], [5]), "ref": ([-8.0], [-9.0])}


def hand() -> PairLogps:
    return make_pairs(**HAND)


@pytest.mark.parametrize(
    ("name", "options", "loss", "rewards"),
    [
        ("dpo", {}, 0.554355, (0.2, -0.1)),  # log(1 + exp(-0.3))
        ("dpo", {"beta": 0.5, "label_smoothing": 0.1}, 0.351413, (1.0, -0.5)),  # log(1 + exp(-1.5)) + 0.1 * 1.5
        ("dpo", {"beta": 2.0, "log_ratio_normalization": "mean"}, 0.220418, (1.0, -0.4)),  # log(1 + exp(-2 (2/4 + 1/5)))
        ("ipo", {}, 4.0, (0.2, -0.1)),  # (3 - 5)^2
        ("ipo", {"tau": 0.5}, 4.0, (1.0, -0.5)),  # (3 - 1)^2
        ("ipo", {"log_ratio_normalization": "mean"}, 18.49, (0.05, -0.02)),  # (2/4 + 1/5 - 5)^2 = 4.3^2
        ("hinge", {}, 0.7, (0.2, -0.1)),  # 1 - 0.1 * 3
        ("hinge", {"beta": 0.5}, 0.0, (1.0, -0.5)),  # 1 - 1.5 < 0
        ("infopo", {}, -1.632121, (2.0, -1.0)),  # -2 + exp(-1)
        # sigmoid(0.2) = 0.549834, sigmoid(0.1) = 0.524979, sigmoid(0.3) = 0.574443
        ("apo_zero", {}, 0.925187, (0.2, -0.1)),  # (1 - 0.549834) + (1 - 0.524979)
        ("apo_down", {}, 0.975391, (0.2, -0.1)),  # 0.549834 + (1 - 0.574443)
        ("nca_pair", {}, 1.319406, (0.2, -0.1)),  # -log 0.549834 - (log 0.450166 + log 0.524979) / 2
        ("robust", {}, 0.516855, (0.2, -0.1)),  # (-0.9 log 0.574443 + 0.1 log 0.425557) / 0.8
        # 0.574443 (log 0.574443 - log 0.9) + 0.425557 (log 0.425557 - log 0.1)
        ("exo_pair", {"label_smoothing": 0.1}, 0.358383, (0.2, -0.1)),
        ("sppo_hard", {}, 25.0, (0.2, -0.1)),  # (2 - 5)^2 + (-1 + 5)^2
    ],
)
def test_hand_worked_pair(name: str, options: dict[str, Any], loss: float, rewards: tuple[float, float]) -> None:
    output = build_objective(name, options)(hand())
    assert output.losses.item() == pytest.approx(loss, abs=2e-6)
    assert output.metrics["rewards/chosen"].item() == pytest.approx(rewards[0])
    assert output.metrics["rewards/rejected"].item() == pytest.approx(rewards[1])
    assert output.metrics["rewards/margins"].item() == pytest.approx(rewards[0] - rewards[1])
    assert output.metrics["rewards/accuracies"].item() == 1.0
    assert not any(metric.requires_grad for metric in output.metrics.values())
    assert output.distributions == ("rewards/margins",)


def dpo(x: Numbers) -> Tensor:
    return 0.8 * torch.log1p(torch.exp(-0.3 * x.h)) + 0.2 * torch.log1p(torch.exp(0.3 * x.h))


def ipo_sum(x: Numbers) -> Tensor:
    return (x.h - 1.0 / 0.6) ** 2


def ipo_mean(x: Numbers) -> Tensor:
    return ((x.lw - x.rw) / x.nw - (x.ll - x.rl) / x.nl - 1.0 / 0.6) ** 2


def hinge(x: Numbers) -> Tensor:
    return (1.0 - 0.3 * x.h).clamp(min=0.0)


def infopo(x: Numbers) -> Tensor:
    return x.rw - x.lw + torch.exp(x.ll - x.rl)


def dpo_mean(x: Numbers) -> Tensor:
    return torch.log1p(torch.exp(-3.0 * ((x.lw - x.rw) / x.nw - (x.ll - x.rl) / x.nl)))


def probability(reward: Tensor) -> Tensor:
    return 1.0 / (1.0 + torch.exp(-reward))


def apo_zero(x: Numbers) -> Tensor:
    return (1.0 - probability(0.3 * (x.lw - x.rw))) + probability(0.3 * (x.ll - x.rl))


def apo_down(x: Numbers) -> Tensor:
    return probability(0.3 * (x.lw - x.rw)) + (1.0 - probability(0.3 * x.h))


def nca_pair(x: Numbers) -> Tensor:
    chosen, rejected = probability(0.3 * (x.lw - x.rw)), probability(0.3 * (x.ll - x.rl))
    return -chosen.log() - 0.5 * (1.0 - chosen).log() - 0.5 * (1.0 - rejected).log()


def robust(x: Numbers) -> Tensor:
    return (-0.8 * probability(0.3 * x.h).log() + 0.2 * probability(-0.3 * x.h).log()) / 0.6


def exo_pair(x: Numbers) -> Tensor:
    q = probability(0.3 * x.h)
    return q * (q / 0.98).log() + (1.0 - q) * ((1.0 - q) / 0.02).log()


def sppo_hard(x: Numbers) -> Tensor:
    return (x.lw - x.rw - 0.5 / 0.3) ** 2 + (x.ll - x.rl + 0.5 / 0.3) ** 2


@pytest.mark.parametrize(
    ("name", "options", "formula"),
    [
        ("dpo", {"beta": 0.3, "label_smoothing": 0.2}, dpo),
        ("dpo", {"beta": 3.0, "log_ratio_normalization": "mean"}, dpo_mean),
        ("ipo", {"tau": 0.3}, ipo_sum),
        ("ipo", {"tau": 0.3, "log_ratio_normalization": "mean"}, ipo_mean),
        ("hinge", {"beta": 0.3}, hinge),
        ("infopo", {}, infopo),
        ("apo_zero", {"beta": 0.3}, apo_zero),
        ("apo_down", {"beta": 0.3}, apo_down),
        ("nca_pair", {"beta": 0.3}, nca_pair),
        ("robust", {"beta": 0.3, "label_smoothing": 0.2}, robust),
        ("exo_pair", {"beta": 0.3, "label_smoothing": 0.02}, exo_pair),
        ("sppo_hard", {"beta": 0.3}, sppo_hard),
    ],
)
def test_losses_and_gradients_agree_with_float64(name: str, options: dict[str, Any], formula: Any) -> None:
    pairs = random_pairs(31, seed=21)
    output = check_against_float64(build_objective(name, options), pairs, formula)
    if name == "hinge":
        active = int((output.losses > 0).sum())
        assert 0 < active < 31  # both sides of the kink


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dpo", math.log(2.0)),
        ("ipo", 25.0),
        ("hinge", 1.0),
        ("infopo", 1.0),
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
        ("nca_pair", 2.0 * math.log(2.0)),
        ("robust", math.log(2.0)),
        ("exo_pair", -math.log(2.0) - 0.5 * math.log(1e-3 * 0.999)),
        ("sppo_hard", 50.0),
    ],
)
def test_policy_equal_to_reference(name: str, expected: float) -> None:
    pairs = random_pairs(9, seed=22)
    same = dataclasses.replace(
        pairs, ref_chosen_logps=pairs.chosen_logps.detach(), ref_rejected_logps=pairs.rejected_logps.detach()
    )
    output, chosen, rejected = check_finite(build_objective(name, {}), same)
    assert output.losses.tolist() == pytest.approx([expected] * 9, rel=1e-6)
    assert output.metrics["rewards/margins"].tolist() == [0.0] * 9
    # The first step already tells the two responses apart; apo_down lets the chosen one be as yet.
    assert (chosen == 0).all() if name == "apo_down" else (chosen < 0).all()
    assert (rejected > 0).all()


def test_ipo_averages_are_defined_where_policy_equals_reference() -> None:
    pairs = make_pairs([-6.0], [-10.0], ([3], [4]), ref=([-6.0], [-10.0]))
    output, chosen, rejected = check_finite(build_objective("ipo", {"log_ratio_normalization": "mean"}), pairs)
    assert output.losses.item() == pytest.approx(25.0)
    assert (chosen.item(), rejected.item()) == (pytest.approx(-10.0 / 3.0), pytest.approx(10.0 / 4.0))


def test_dpo_turned_round_differs_by_the_margin() -> None:
    pairs = random_pairs(13, seed=23)
    objective = build_objective("dpo", {})
    straight, turned = objective(pairs), objective(swapped(pairs))
    torch.testing.assert_close(turned.losses - straight.losses, straight.metrics["rewards/margins"], rtol=1e-5, atol=1e-5)
    half = build_objective("dpo", {"label_smoothing": 0.5})
    torch.testing.assert_close(half(pairs).losses, half(swapped(pairs)).losses)


def test_ipo_and_hinge_turned_round() -> None:
    pairs = random_pairs(13, seed=24)
    ipo = build_objective("ipo", {"tau": 0.25})
    margins = ipo(pairs).metrics["rewards/margins"] / 0.25
    # (-h - c)^2 - (h - c)^2 = 4 c h, with c = 2
    torch.testing.assert_close(ipo(swapped(pairs)).losses - ipo(pairs).losses, 8.0 * margins, rtol=1e-4, atol=1e-4)
    small = build_objective("hinge", {"beta": 1e-3})  # no pair reaches the kink: (1 + z) + (1 - z)
    torch.testing.assert_close(small(pairs).losses + small(swapped(pairs)).losses, torch.full((13,), 2.0))


def rewarded(chosen: float, rejected: float) -> PairLogps:
    """A pair of these rewards at beta 1."""
    return make_pairs([chosen - 20.0], [rejected - 20.0], ([7], [9]), ref=([-20.0], [-20.0]))


@pytest.mark.parametrize(
    ("name", "options", "rewards", "loss"),
    [
        # Where each loss is least: at a finite distance from the reference.
        ("exo_pair", {"label_smoothing": 0.25}, (math.log(3.0), 0.0), 0.0),  # sigmoid(log 3) = 1 - 0.25
        ("exo_pair", {"label_smoothing": 0.5}, (2.0, 2.0), 0.0),
        ("sppo_hard", {}, (0.5, -0.5), 0.0),
        ("nca_pair", {}, (math.log(2.0), -60.0), -math.log(2.0 / 3.0) - 0.5 * math.log(1.0 / 3.0)),  # sigmoid(log 2) = 2 / 3
    ],
)
def test_losses_with_a_least_value_pull_no_further(
    name: str, options: dict[str, Any], rewards: tuple[float, float], loss: float
) -> None:
    output, chosen, rejected = run_with_gradients(build_objective(name, {"beta": 1.0, **options}), rewarded(*rewards))
    assert output.losses.item() == pytest.approx(loss, abs=1e-6)
    assert (chosen.item(), rejected.item()) == (pytest.approx(0.0, abs=1e-5), pytest.approx(0.0, abs=1e-5))


def test_robust_is_dpo_on_the_right_labels_in_the_mean() -> None:
    pairs = random_pairs(17, seed=27)
    objective = build_objective("robust", {"label_smoothing": 0.3})
    # Of equal pairs three in ten are the wrong way round.
    mean = 0.7 * objective(pairs).losses + 0.3 * objective(swapped(pairs)).losses
    torch.testing.assert_close(mean, build_objective("dpo", {})(pairs).losses, rtol=1e-5, atol=1e-6)
    barely = build_objective("robust", {"label_smoothing": 1e-6})
    torch.testing.assert_close(barely(pairs).losses, build_objective("dpo", {})(pairs).losses, rtol=1e-4, atol=1e-5)


def test_apo_zero_turned_round_adds_up_to_a_constant() -> None:
    pairs = random_pairs(17, seed=28)
    objective = build_objective("apo_zero", {})
    torch.testing.assert_close(objective(pairs).losses + objective(swapped(pairs)).losses, torch.full((17,), 2.0))


def test_apo_down_lowers_the_chosen_response_where_it_is_ahead_enough() -> None:
    objective = build_objective("apo_down", {"beta": 1.0})
    _, chosen, rejected = run_with_gradients(objective, rewarded(0.1, -3.0))
    assert chosen.item() > 0.0
    assert rejected.item() > 0.0
    _, chosen, rejected = run_with_gradients(objective, rewarded(-3.0, -3.1))
    assert chosen.item() < 0.0 < rejected.item()


def test_the_mean_per_token_takes_the_length_out_of_dpo() -> None:
    short = make_pairs([-6.0], [-10.0], ([3], [4]), ref=([-9.0], [-8.0]))
    long = make_pairs([-60.0], [-100.0], ([30], [40]), ref=([-90.0], [-80.0]))
    objective = build_objective("dpo", {"log_ratio_normalization": "mean"})
    assert objective(long).losses.item() == pytest.approx(objective(short).losses.item(), rel=1e-6)
    assert objective(long).metrics["rewards/margins"].item() == pytest.approx(0.1 * (1.0 + 0.5))


@pytest.mark.parametrize("name", NAMES)
def test_one_token_and_equal_responses(name: str) -> None:
    pairs = make_pairs([-3.0, -7.0], [-5.0, -7.0], ([1, 3], [1, 3]), ref=([-2.5, -8.0], [-4.0, -8.0]))
    output, _, _ = check_finite(build_objective(name, {}), pairs)
    assert output.metrics["rewards/margins"][1].item() == 0.0
    assert output.metrics["rewards/accuracies"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dpo", {"label_smoothing": 0.1}),
        ("dpo", {"log_ratio_normalization": "mean"}),
        ("ipo", {}),
        ("ipo", {"log_ratio_normalization": "mean"}),
        ("hinge", {}),
        ("infopo", {}),
        *((name, {}) for name in PAIRWISE),
    ],
)
def test_very_long_responses_stay_finite(name: str, options: dict[str, Any]) -> None:
    sums = ([-5000.0, -1.0, -9000.0, -5000.0], [-1.0, -5000.0, -4000.0, -4999.5])
    refs = ([-1.0, -5000.0, -4000.0, -5000.5], [-5000.0, -1.0, -9000.0, -5000.0])
    pairs = make_pairs(sums[0], sums[1], ([2000, 1, 2001, 1999], [1, 2000, 2003, 1999]), ref=refs)
    _, chosen, rejected = check_finite(build_objective(name, options), pairs)
    if name not in ("ipo", "apo_zero", "apo_down", "exo_pair"):
        # Where all is wrong both responses are pushed the right way.
        assert chosen[0] < 0 < rejected[0]


def test_infopo_follows_its_tangent_beyond_the_largest_exponent() -> None:
    pairs = make_pairs([-1.0, -1.0], [-20.0, -20.0], ([5, 5], [7, 7]), ref=([-1.0, -1.0], [-49.0, -55.0]))
    output, _, rejected = run_with_gradients(build_objective("infopo", {}), pairs)
    # Log-ratios 29 and 35: exp(29), and exp(30) (1 + 5).
    assert output.losses.tolist() == pytest.approx([math.exp(29.0), 6.0 * math.exp(30.0)], rel=1e-5)
    assert rejected.tolist() == pytest.approx([math.exp(29.0), math.exp(30.0)], rel=1e-5)


@pytest.mark.parametrize(("function", "minus"), [(bounded_exp, 0.0), (bounded_expm1, 1.0)])
def test_bounded_exponentials_join_their_tangent_smoothly(function: Any, minus: float) -> None:
    x = torch.tensor([-100.0, -1e-4, 0.0, 2.0, MAX_EXPONENT, MAX_EXPONENT + 1.0, 1e4], requires_grad=True)
    y = function(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    top = math.exp(MAX_EXPONENT)
    exact = [math.expm1(v) if minus else math.exp(v) for v in (-100.0, -1e-4, 0.0, 2.0, MAX_EXPONENT)]
    assert y.tolist() == pytest.approx([*exact, 2.0 * top, (1e4 - 29.0) * top], rel=1e-5)
    assert slope.tolist() == pytest.approx([0.0, 1.0 - 1e-4, 1.0, math.exp(2.0), top, top, top], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_may_be_cut_anywhere(name: str) -> None:
    pairs = random_pairs(11, seed=25)
    objective = build_objective(name, {})
    whole = objective(pairs).losses
    parts = [objective(part_of(pairs, part)).losses for part in (slice(0, 2), slice(2, 9), slice(9, 11))]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_all_that_is_needed(name: str) -> None:
    assert build_objective(name, {}).needs == LogpNeeds(reference=True)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("dpo", {"beta": 0.0}, ["beta", "greater than 0"]),
        ("dpo", {"label_smoothing": 0.6}, ["label_smoothing", "at least 0 and at most 0.5"]),
        ("dpo", {"log_ratio_normalization": "average"}, ["log_ratio_normalization", "sum, mean", "'average'"]),
        *((name, {"beta": 0.0}, ["beta must be a number greater than 0, not 0.0"]) for name in PAIRWISE),
        ("robust", {"label_smoothing": 0.5}, ["label_smoothing", "at least 0 and below 0.5"]),
        ("robust", {"label_smoothing": 0.0}, ["label_smoothing 0 leaves robust nothing to correct; use objective dpo"]),
        ("exo_pair", {"label_smoothing": 0.0}, ["label_smoothing", "greater than 0 and at most 0.5"]),
        ("apo_zero", {"label_smoothing": 0.1}, ["'apo_zero' has no option label_smoothing; it has beta"]),
        ("ipo", {"tau": -0.1}, ["tau", "greater than 0", "-0.1"]),
        ("ipo", {"log_ratio_normalization": "average"}, ["log_ratio_normalization", "sum, mean", "'average'"]),
        ("hinge", {"beta": math.inf}, ["beta", "inf"]),
        ("ipo", {"beta": 0.1}, ["'ipo'", "beta", "tau, log_ratio_normalization"]),
        ("ipo", {"label_smoothing": 0.1}, ["'ipo' has no option label_smoothing", "tau"]),
        ("hinge", {"label_smoothing": 0.1}, ["'hinge' has no option label_smoothing; it has beta"]),
        ("infopo", {"beta": 0.1}, ["'infopo' has no option beta; it has none"]),
    ],
)
def test_options_that_cannot_work_are_refused(name: str, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=words[0]) as error:
        build_objective(name, options)
    assert all(word in str(error.value) for word in words), error.value


def test_infopo_says_where_it_comes_from() -> None:
    text = type(build_objective("infopo", {})).__doc__ or ""
    assert "Experimental" in text
    assert "abstract of the paper alone" in text
