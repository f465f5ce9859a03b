"""RMiPO against numbers worked by hand, formulas written again in float64, and its limits."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from typing import Any

import pytest
import torch

from megatron_rmipo.objectives.base import LossOutput, PairLogps
from megatron_rmipo.objectives.rmipo import Rmipo, RmipoConfig
from tests.objectives.float64 import softplus
from tests.objectives.pairs import make_pairs, random_pairs, swapped

# One pair worked by hand: Lw = -6 over 3 tokens, Ll = -10 over 4, Uw = -8, Ul = -11.
# rewards (beta 2): 2 * -2 = -4 and 2 * -2.5 = -5, margin 1. PMI sums: 2 and 1, dpmi 1. gamma = 0.3 + 1.3 / e = 0.7782433...
HAND = {"chosen": [-6.0], "rejected": [-10.0], "lengths": ([3], [4]), "uncond": ([-8.0], [-11.0])}
HAND_GAMMA = 0.778243273
PRESETS = ["per_token", "paper", "official"]
# What the loss reads, in the order in which float64_loss unpacks it.
COLUMNS = [
    f"{prefix}{side}_{what}" for prefix in ("", "uncond_") for what in ("logps", "lengths") for side in ("chosen", "rejected")
]


def run(pairs: PairLogps, **options: Any) -> LossOutput:
    return Rmipo(RmipoConfig(**options))(pairs)


def value(output: LossOutput, name: str) -> float:
    return output.metrics[name].item()


def test_hand_worked_pair_in_the_papers_form() -> None:
    output = run(make_pairs(**HAND), preset="paper")
    assert value(output, "rewards/chosen") == pytest.approx(-4.0)
    assert value(output, "rewards/rejected") == pytest.approx(-5.0)
    assert value(output, "rewards/margins") == pytest.approx(1.0)
    assert value(output, "dpmi") == pytest.approx(1.0)
    assert value(output, "gamma") == pytest.approx(HAND_GAMMA, rel=1e-6)
    # -logsigmoid(1 - 0.778243) = log(1 + exp(-0.221757)) = log(1.801110) = 0.588403
    assert output.losses.item() == pytest.approx(0.588403, abs=1e-6)
    assert value(output, "rewards/accuracies") == 1.0


def test_hand_worked_pair_per_token_is_the_default() -> None:
    # dpmi = (-2 + 8/3) - (-2.5 + 11/4) = 2/3 - 1/4 = 5/12; the margin counts once. gamma = 0.3 + 1.3 e^(-5/12) = 1.157013
    for options in ({}, {"preset": "per_token"}):
        output = run(make_pairs(**HAND), **options)
        assert value(output, "dpmi") == pytest.approx(5.0 / 12.0, rel=1e-6)
        assert value(output, "gamma") == pytest.approx(0.3 + 1.3 * math.exp(-5.0 / 12.0), rel=1e-6)
        assert output.losses.item() == pytest.approx(math.log1p(math.exp(-(1.0 - (0.3 + 1.3 * math.exp(-5.0 / 12.0))))), rel=1e-6)


def test_hand_worked_pair_in_the_authors_form() -> None:
    # The first token unscored: Uw over 2 tokens, Ul over 3. dpmi = (-2 + 4) - (-2.5 + 11/3) = 5/6; the margin counts beta times.
    output = run(make_pairs(**HAND, uncond_lengths=([2], [3])), preset="official")
    gamma = 0.3 + 1.3 * math.exp(-5.0 / 6.0)
    assert value(output, "dpmi") == pytest.approx(5.0 / 6.0, rel=1e-6)
    assert value(output, "gamma") == pytest.approx(gamma, rel=1e-6)
    assert output.losses.item() == pytest.approx(math.log1p(math.exp(-(1.0 - 2.0 * gamma))), rel=1e-6)


@pytest.mark.parametrize(
    ("schedule", "signal", "expected"),
    [
        ("linear", 0.25, 1.275),  # 1.6 - 1.3 / 4
        ("linear", 3.0, 0.3),
        ("linear", -1.0, 1.6),
        ("cosine", 0.5, 0.95),  # half way
        ("cosine", 1.0 / 3.0, 1.275),  # cos 60 degrees = 1/2: 0.3 + 1.3 * 3/4
        ("cosine", 2.0, 0.3),
        ("cosine", -0.5, 1.6),
        ("exponential", math.log(2.0), 0.95),
        ("exponential", 0.0, 1.6),
        ("exponential", -7.0, 1.6),
        ("exponential", 300.0, 0.3),
    ],
)
def test_schedules_at_worked_points(schedule: str, signal: float, expected: float) -> None:
    pairs = make_pairs([-6.0], [-10.0], ([3], [4]), ([-6.0 - 3.0 * signal], [-10.0]))
    assert value(run(pairs, margin_schedule=schedule), "gamma") == pytest.approx(expected, abs=2e-6)


def test_schedule_none_is_gamma_max_for_every_pair_and_needs_no_unconditional_pass() -> None:
    objective = Rmipo(RmipoConfig(margin_schedule="none", gamma_max=0.9))
    assert objective.needs.unconditional is None
    output = objective(make_pairs([-6.0, -9.0], [-10.0, -1.0], ([3, 5], [4, 1])))
    assert output.metrics["gamma"].tolist() == pytest.approx([0.9, 0.9])
    assert "dpmi" not in output.metrics
    assert "dpmi" not in output.distributions
    assert output.losses[0].item() == pytest.approx(math.log1p(math.exp(-(1.0 - 0.9))), rel=1e-6)


def test_gap_signal_is_the_average_log_probability_gap_without_beta() -> None:
    objective = Rmipo(RmipoConfig(margin_signal="gap"))
    assert objective.needs.unconditional is None
    output = objective(make_pairs([-6.0], [-10.0], ([3], [4])))
    assert value(output, "gamma") == pytest.approx(0.3 + 1.3 * math.exp(-0.5), rel=1e-6)


def float64_loss(pairs: PairLogps, config: RmipoConfig) -> tuple[list[float], list[float]]:
    """Losses and margins by a plain loop over pairs in float64, written from the formulas."""
    losses, margins = [], []
    columns = [getattr(pairs, name) for name in COLUMNS]
    for lw, ll, nw, nl, uw, ul, mw, ml in zip(*(column.double().tolist() for column in columns), strict=True):
        by_token = config.pmi_normalization == "mean"
        dpmi = (lw / nw - uw / mw) - (ll / nl - ul / ml) if by_token else (lw - uw) - (ll - ul)
        r = max(0.0, dpmi)
        share = {
            "exponential": math.exp(-r),
            "linear": 1.0 - min(r, 1.0),
            "cosine": 0.5 + 0.5 * math.cos(math.pi * min(r, 1.0)),
        }[config.margin_schedule]
        g = config.gamma_max * share + config.gamma_min * (1.0 - share)
        reward = config.beta * (lw / nw - ll / nl) if config.length_normalization else config.beta * (lw - ll)
        z = reward - (config.beta if config.margin_scale == "beta_gamma" else 1.0) * g
        loss = softplus(-z) + config.label_smoothing * z  # -(1-e) log s(z) - e log s(-z), because log s(-z) = log s(z) - z
        losses.append(loss + config.sft_weight * -lw / pairs.mean_chosen_length.item())
        margins.append(g)
    return losses, margins


@pytest.mark.parametrize(
    ("scale", "normalization", "context"), list(itertools.product(["gamma", "beta_gamma"], ["sum", "mean"], ["bos", "none"]))
)
@pytest.mark.parametrize("schedule", ["exponential", "linear", "cosine"])
@pytest.mark.parametrize("length_normalization", [True, False])
def test_every_combination_agrees_with_float64(
    scale: str, normalization: str, context: str, schedule: str, length_normalization: bool
) -> None:
    config = RmipoConfig(
        margin_scale=scale,
        pmi_normalization=normalization,
        unconditional_context=context,
        margin_schedule=schedule,
        length_normalization=length_normalization,
        beta=1.7,
        gamma_min=0.2,
        gamma_max=1.1,
        label_smoothing=0.13,
        sft_weight=0.4,
    )
    pairs = random_pairs(29, seed=7, context=context)
    output = Rmipo(config)(pairs)
    losses, margins = float64_loss(pairs, config)
    torch.testing.assert_close(output.losses.double(), torch.tensor(losses).double(), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(output.metrics["gamma"].double(), torch.tensor(margins).double(), rtol=2e-5, atol=2e-5)


def test_gradient_is_that_of_the_loss_with_the_margin_held_constant() -> None:
    config = RmipoConfig(sft_weight=0.3, label_smoothing=0.1)
    pairs = random_pairs(17, seed=3)
    output = Rmipo(config)(pairs)
    output.losses.sum().backward()
    z = output.metrics["rewards/margins"].double() - output.metrics["gamma"].double()
    slope = -(0.9 * torch.sigmoid(-z) - 0.1 * torch.sigmoid(z)) * config.beta
    nll_slope = -0.3 / pairs.mean_chosen_length.double()
    assert pairs.chosen_logps.grad is not None
    assert pairs.rejected_logps.grad is not None
    chosen, rejected = slope / pairs.chosen_lengths + nll_slope, -slope / pairs.rejected_lengths
    torch.testing.assert_close(pairs.chosen_logps.grad.double(), chosen, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(pairs.rejected_logps.grad.double(), rejected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{"margin_signal": "gap"}, {}])
def test_numeric_gradient_with_the_margin_of_the_unmoved_point(options: dict[str, Any]) -> None:
    config = RmipoConfig(**options)
    pairs = random_pairs(5, seed=11)
    output = Rmipo(config)(pairs)
    output.losses.sum().backward()
    gamma = output.metrics["gamma"].double()

    def loss(chosen: torch.Tensor) -> torch.Tensor:
        reward = config.beta * (chosen / pairs.chosen_lengths - pairs.rejected_logps.detach().double() / pairs.rejected_lengths)
        return -torch.nn.functional.logsigmoid(reward - gamma)

    chosen = pairs.chosen_logps.detach().double()
    numeric = (loss(chosen + 1e-4) - loss(chosen - 1e-4)) / 2e-4
    assert pairs.chosen_logps.grad is not None
    torch.testing.assert_close(pairs.chosen_logps.grad.double(), numeric, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("preset", PRESETS)
def test_swapping_the_responses_turns_rewards_and_dpmi_round(preset: str) -> None:
    pairs = random_pairs(23, seed=5, context="none" if preset == "official" else "bos")
    straight, turned = run(pairs, preset=preset), run(swapped(pairs), preset=preset)
    torch.testing.assert_close(turned.metrics["rewards/margins"], -straight.metrics["rewards/margins"])
    torch.testing.assert_close(turned.metrics["dpmi"], -straight.metrics["dpmi"])
    torch.testing.assert_close(turned.metrics["rewards/chosen"], straight.metrics["rewards/rejected"])
    assert torch.equal(turned.metrics["rewards/accuracies"], 1.0 - straight.metrics["rewards/accuracies"])
    # One of the two orders has dpmi <= 0 and therefore the widest margin.
    widest = torch.maximum(straight.metrics["gamma"], turned.metrics["gamma"])
    torch.testing.assert_close(widest, torch.full_like(widest, 1.6))


def test_full_smoothing_ignores_the_order() -> None:
    pairs = random_pairs(9, seed=6)
    options: dict[str, Any] = {"label_smoothing": 0.5, "margin_schedule": "none", "gamma_max": 0.0}
    torch.testing.assert_close(run(pairs, **options).losses, run(swapped(pairs), **options).losses)


@pytest.mark.parametrize("preset", PRESETS)
def test_equal_responses_get_the_widest_margin_and_a_finite_gradient(preset: str) -> None:
    pairs = make_pairs([-7.0], [-7.0], ([3], [3]), ([-9.0], [-9.0]), ([2], [2]))
    output = run(pairs, preset=preset)
    output.losses.sum().backward()
    assert value(output, "dpmi") == 0.0
    assert value(output, "gamma") == pytest.approx(1.6)
    assert value(output, "rewards/accuracies") == 0.0
    margin = 3.2 if preset == "official" else 1.6
    assert output.losses.item() == pytest.approx(math.log1p(math.exp(margin)), rel=1e-6)
    assert pairs.chosen_logps.grad is not None
    assert torch.isfinite(pairs.chosen_logps.grad).all()


@pytest.mark.parametrize("normalization", ["sum", "mean"])
def test_one_token_response_without_context_has_no_mutual_information(normalization: str) -> None:
    # Chosen: one token, nothing of log p(y) scored. Rejected: -10 + 11 = 1 nat over 4 tokens, or -2.5 + 11/3 a token.
    pairs = make_pairs([-3.0], [-10.0], ([1], [4]), ([0.0], [-11.0]), ([0], [3]))
    output = run(pairs, preset="official", pmi_normalization=normalization)
    output.losses.sum().backward()
    expected = -1.0 if normalization == "sum" else -(11.0 / 3.0 - 2.5)
    assert value(output, "dpmi") == pytest.approx(expected, rel=1e-5)
    assert pairs.chosen_logps.grad is not None
    assert torch.isfinite(pairs.chosen_logps.grad).all()
    both = make_pairs([-3.0], [-5.0], ([1], [1]), ([0.0], [0.0]), ([0], [0]))
    assert value(run(both, preset="official", pmi_normalization=normalization), "gamma") == pytest.approx(1.6)


@pytest.mark.parametrize("schedule", ["exponential", "linear", "cosine"])
def test_margins_within_a_hundredth_of_a_bound_are_counted(schedule: str) -> None:
    # dpmi -1, 0.001, 0.5, 60: exponential leaves 0.5 between the bounds, as the others do.
    pairs = make_pairs([-1.0, -1.0, -1.0, -1.0], [-1.0] * 4, ([1] * 4, [1] * 4), ([0.0, -1.001, -1.5, -61.0], [-1.0] * 4))
    metrics = run(pairs, margin_schedule=schedule).metrics
    assert metrics["gamma/at_max"].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert metrics["gamma/at_min"].tolist() == [0.0, 0.0, 0.0, 1.0]
    assert not {"gamma/at_min", "gamma/at_max"} & run(pairs, margin_schedule="none").metrics.keys()


@pytest.mark.parametrize(
    ("options", "dpmi", "words"),
    [
        # Of six pairs one has dpmi <= 0; of the five others five, or four, which is no more than 80 %, are at a bound.
        (
            {"preset": "paper"},
            [-3.0, 6.0, 7.0, 8.0, 9.0, 0.001],
            ["of 5 pairs", "4 have", "1 at gamma_max", "--preset per_token"],
        ),
        ({"preset": "paper"}, [-3.0, 6.0, 7.0, 8.0, 9.0, 0.5], None),
        ({}, [-3.0, 0.001, 0.002, 0.003, 0.001, 0.001], ["of 5 pairs", "0 have", "5 at gamma_max", "--margin-schedule none"]),
        ({"margin_schedule": "linear"}, [-3.0, 2.0, 2.0, 2.0, 2.0, 2.0], ["--margin-schedule exponential"]),
        ({}, [-3.0, 8.0, 8.0, 8.0, 8.0, 8.0], ["--margin-signal gap"]),
        ({}, [-3.0] * 6, None),
        ({"margin_signal": "gap"}, [9.0] * 6, None),
        ({"margin_schedule": "none"}, [9.0] * 6, None),
    ],
)
def test_a_margin_that_is_only_a_sign_is_told_with_the_option_that_moves_it(
    options: dict[str, Any], dpmi: list[float], words: list[str] | None
) -> None:
    chosen = [value - 10.0 for value in dpmi]
    pairs = make_pairs(chosen, [-10.0] * 6, ([1] * 6, [1] * 6), ([-10.0] * 6, [-10.0] * 6))
    objective = Rmipo(RmipoConfig(**options))
    remark = objective.remark(objective(pairs).metrics)
    assert (remark is None) == (words is None), remark
    assert all(word in (remark or "") for word in words or []), remark


def test_one_token_responses_after_bos_are_ordinary() -> None:
    output = run(make_pairs([-1.0], [-4.0], ([1], [1]), ([-2.0], [-4.5]), ([1], [1])))
    assert value(output, "dpmi") == pytest.approx(0.5)
    assert value(output, "gamma") == pytest.approx(0.3 + 1.3 * math.exp(-0.5), rel=1e-6)


@pytest.mark.parametrize("schedule", ["exponential", "linear", "cosine"])
@pytest.mark.parametrize("length_normalization", [True, False])
def test_long_responses_stay_finite(schedule: str, length_normalization: bool) -> None:
    sums = ([-5000.0, -1.0, -5000.0], [-1.0, -5000.0, -4999.5])
    pairs = make_pairs(sums[0], sums[1], ([2000, 1, 2000], [1, 2000, 1999]), ([-9000.0, -2.0, -5000.5], [-2.0, -9000.0, -5000.0]))
    output = run(pairs, margin_schedule=schedule, length_normalization=length_normalization, label_smoothing=0.1, sft_weight=1.0)
    output.losses.sum().backward()
    assert pairs.chosen_logps.grad is not None
    assert pairs.rejected_logps.grad is not None
    for tensor in (output.losses, pairs.chosen_logps.grad, pairs.rejected_logps.grad, *output.metrics.values()):
        assert torch.isfinite(tensor).all()
    gamma = output.metrics["gamma"]
    assert ((gamma >= 0.3 - 1e-6) & (gamma <= 1.6 + 1e-6)).all()


def test_metrics_are_detached_and_the_advertised_ones() -> None:
    output = run(random_pairs(3, seed=1))
    assert output.losses.requires_grad
    assert not any(metric.requires_grad for metric in output.metrics.values())
    assert output.distributions == ("gamma", "dpmi", "rewards/margins")
    assert set(output.distributions) <= set(output.metrics)


@pytest.mark.parametrize(
    ("preset", "switches"),
    [
        ("per_token", ("gamma", "mean", "bos")),
        ("paper", ("gamma", "sum", "bos")),
        ("official", ("beta_gamma", "mean", "none")),
    ],
)
def test_presets_fill_the_three_switches(preset: str, switches: tuple[str, str, str]) -> None:
    config = RmipoConfig(preset=preset)
    assert (config.margin_scale, config.pmi_normalization, config.unconditional_context) == switches
    assert Rmipo(config).needs.unconditional == switches[2]
    assert RmipoConfig(preset=preset, pmi_normalization="mean").pmi_normalization == "mean"


@pytest.mark.parametrize(
    ("options", "preset"),
    [
        ({}, "per_token"),
        ({"pmi_normalization": "sum"}, "paper"),
        ({"preset": "per_token", "pmi_normalization": "sum"}, "per_token"),
        ({"margin_scale": "beta_gamma"}, "per_token"),
        ({"margin_scale": "beta_gamma", "pmi_normalization": "sum"}, "per_token"),
        ({"margin_scale": "beta_gamma", "pmi_normalization": "sum", "unconditional_context": "none"}, "official"),
        ({"margin_scale": "beta_gamma", "pmi_normalization": "mean", "unconditional_context": "none"}, "official"),
        ({"margin_signal": "gap"}, "per_token"),
        ({"margin_signal": "gap", "margin_scale": "beta_gamma"}, "official"),
        ({"margin_schedule": "none", "margin_scale": "beta_gamma"}, "official"),
        ({"preset": "paper", "margin_scale": "beta_gamma"}, "paper"),
    ],
)
def test_switches_alone_name_the_preset_they_are(options: dict[str, Any], preset: str) -> None:
    config = RmipoConfig(**options)
    assert config.preset == preset
    assert all(getattr(config, name) == value for name, value in options.items())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"margin_signal": "gap"},
        {"margin_schedule": "none"},
        {"preset": "paper"},
        {"preset": "paper", "pmi_normalization": "mean"},
        {"preset": "official", "gamma_min": 0.0, "gamma_max": 2.0},
        {"margin_scale": "beta_gamma", "pmi_normalization": "sum", "unconditional_context": "none"},
        {"margin_scale": "beta_gamma", "pmi_normalization": "mean", "unconditional_context": "none"},
        {"margin_signal": "gap", "margin_scale": "beta_gamma"},
    ],
)
def test_a_saved_configuration_builds_the_same_objective_again(options: dict[str, Any]) -> None:
    config = RmipoConfig(**options)
    assert RmipoConfig(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preset": "paperr"}, ["preset", "per_token, paper, official", "paperr"]),
        ({"margin_schedule": "step"}, ["margin_schedule", "cosine", "step"]),
        ({"margin_signal": "mi"}, ["margin_signal", "pmi, gap"]),
        ({"beta": 0.0}, ["beta", "greater than 0"]),
        ({"beta": math.nan}, ["beta", "nan"]),
        ({"beta": "2.0"}, ["beta", "'2.0'"]),
        ({"gamma_min": 2.0}, ["gamma_min 2 is greater than gamma_max 1.6 (the default)"]),
        ({"gamma_max": 0.1}, ["gamma_min 0.3 (the default) is greater than gamma_max 0.1"]),
        ({"gamma_min": 1.0, "gamma_max": 1.0}, ["gamma_min 1 equal to gamma_max", "margin_schedule none and gamma_max 1 alone"]),
        ({"gamma_max": 0.3, "margin_signal": "gap"}, ["gamma_min 0.3 (the default) equal", "margin_schedule none"]),
        ({"gamma_max": -0.5}, ["gamma_max", "at least 0"]),
        ({"label_smoothing": 0.6}, ["label_smoothing", "at least 0 and at most 0.5"]),
        ({"sft_weight": -1.0}, ["sft_weight", "at least 0"]),
        ({"length_normalization": 1}, ["length_normalization", "true or false"]),
        ({"margin_schedule": "none", "gamma_min": 0.3}, ["gamma_min", "would do nothing"]),
        ({"margin_schedule": "none", "margin_signal": "pmi"}, ["margin_signal", "would do nothing"]),
        ({"margin_schedule": "none", "pmi_normalization": "sum"}, ["pmi_normalization", "margin_schedule none"]),
        (
            {"preset": "official", "margin_scale": "gamma", "pmi_normalization": "sum", "unconditional_context": "bos"},
            ["preset 'official' would do nothing", "give preset 'paper'"],
        ),
        (
            {"preset": "paper", "margin_signal": "gap", "margin_scale": "beta_gamma"},
            ["preset 'paper' would do nothing: margin_scale beta_gamma leave", "give preset 'official'"],
        ),
        (
            {
                "preset": "per_token",
                "margin_scale": "beta_gamma",
                "pmi_normalization": "sum",
                "unconditional_context": "none",
            },
            ["preset 'per_token' would do nothing", "give preset 'official'"],
        ),
        ({"margin_signal": "gap", "unconditional_context": "bos"}, ["unconditional_context", "margin_signal gap"]),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        RmipoConfig(**options)
    assert all(word in str(error.value) for word in words), error.value
