"""alpha-DPO against numbers worked by hand, float64 formulas of both presets, and hand-written moving averages."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import statistics
from types import MappingProxyType
from typing import Any

import pytest
import torch

from megatron_rmipo.objectives.alpha_dpo import AlphaDpo, AlphaDpoConfig
from megatron_rmipo.objectives.base import LogpNeeds, PairLogps
from tests.objectives.batches import batch_of, cut, gradients, with_prepared
from tests.objectives.float64 import gaps_of, softplus
from tests.objectives.pairs import make_pairs, random_pairs

# Per token: x = -1 - -2 = 1 and -3 - -2 = -1. Sums: h = (-2 + 3) - (-6 + 6) = 1 and (-6 + 7) - (-2 + 4) = -1.
HAND: dict[str, Any] = {"chosen": [-2.0, -6.0], "rejected": [-6.0, -2.0], "lengths": ([2, 2], [3, 1])}
HAND_REF = ([-3.0, -7.0], [-6.0, -4.0])

OFFICIAL_SWITCHES = {"z_scale": "beta_alpha", "gap_normalization": "mean", "gap_statistics": "ema"}


def rows_of(pairs: PairLogps) -> list[tuple[float, ...]]:
    columns = [pairs.chosen_logps, pairs.rejected_logps, pairs.ref_chosen_logps, pairs.ref_rejected_logps]
    columns += [pairs.chosen_lengths, pairs.rejected_lengths]
    return list(zip(*(column.double().tolist() for column in columns if column is not None), strict=True))


def test_hand_worked_batch_in_the_papers_form() -> None:
    # Gaps 1 and -1: mean 0, unbiased spread sqrt 2, z = 0.7071 and -0.7071. gamma = 2.5 * 0.3 = 0.75.
    objective = AlphaDpo()
    output = objective(with_prepared(objective, make_pairs(**HAND, ref=HAND_REF)))
    z = 1.0 / math.sqrt(2.0)
    assert output.metrics["gap"].tolist() == pytest.approx([1.0, -1.0])
    assert output.metrics["alpha_dpo/z"].tolist() == pytest.approx([z, -z])
    assert output.metrics["gamma"].tolist() == pytest.approx([0.75 + 0.1 * z, 0.75 - 0.1 * z])
    assert output.metrics["rewards/margins"].tolist() == pytest.approx([2.5, -2.5])
    expected = [softplus(-(2.5 - 0.75 - 0.1 * z)), softplus(2.5 + 0.75 - 0.1 * z)]
    assert output.losses.tolist() == pytest.approx(expected, rel=1e-6)


def test_hand_worked_first_batch_in_the_authors_form() -> None:
    # Per token the gaps are (-1 + 1.5) - (-2 + 2) = 0.5 and (-3 + 3.5) - (-2 + 4) = -1.5: mean -0.5, spread sqrt 2, of which the
    # averages that start at zero have a tenth: z = (0.5 + 0.05) / 0.1414 and (-1.5 + 0.05) / 0.1414.
    objective = AlphaDpo(AlphaDpoConfig(preset="official"))
    output = objective(with_prepared(objective, make_pairs(**HAND, ref=HAND_REF)))
    z = [5.5 / math.sqrt(2.0), -14.5 / math.sqrt(2.0)]
    assert output.metrics["gap"].tolist() == pytest.approx([0.5, -1.5])
    assert output.metrics["alpha_dpo/z"].tolist() == pytest.approx(z)
    margins = [2.5 * (0.3 + 0.1 * z[0]), 2.5 * (0.3 + 0.1 * z[1])]
    assert output.metrics["gamma"].tolist() == pytest.approx(margins)
    assert output.losses.tolist() == pytest.approx([softplus(-(2.5 - margins[0])), softplus(2.5 + margins[1])], rel=1e-6)


@pytest.mark.parametrize(
    ("scale", "normalization", "length_normalization"),
    [*itertools.product(["alpha", "beta_alpha"], ["sum", "mean"], [True]), ("alpha", None, False), ("beta_alpha", None, False)],
)
def test_every_combination_agrees_with_float64(scale: str, normalization: str | None, length_normalization: bool) -> None:
    config = AlphaDpoConfig(
        z_scale=scale,  # type: ignore[arg-type]
        gap_normalization=normalization,  # type: ignore[arg-type]
        length_normalization=length_normalization,
        beta=1.7,
        alpha=0.2,
        gamma_beta_ratio=0.45,
        label_smoothing=0.13,
    )
    objective, pairs = AlphaDpo(config), random_pairs(29, seed=7)
    output = objective(with_prepared(objective, pairs))
    gaps = gaps_of(pairs, per_token=normalization == "mean")
    mean, spread = statistics.fmean(gaps), statistics.stdev(gaps)
    losses, slopes = [], []
    for (lw, ll, _, _, nw, nl), gap in zip(rows_of(pairs), gaps, strict=True):
        per_token = (lw / nw - ll / nl) if length_normalization else lw - ll
        margin = 1.7 * 0.45 + (1.7 if scale == "beta_alpha" else 1.0) * 0.2 * (gap - mean) / spread
        logit = 1.7 * per_token - margin
        losses.append(0.87 * softplus(-logit) + 0.13 * softplus(logit))
        slope = 1.7 * (0.13 - 1.0 / (1.0 + math.exp(logit)) if logit < 30 else 0.13)
        slopes.append((slope / nw, -slope / nl) if length_normalization else (slope, -slope))
    torch.testing.assert_close(output.losses.double(), torch.tensor(losses).double(), rtol=2e-5, atol=2e-5)
    # The slope holds z constant: no gradient flows through it.
    output.losses.sum().backward()
    for gradient, expected in zip(gradients(pairs), zip(*slopes, strict=True), strict=True):
        torch.testing.assert_close(gradient, torch.tensor(expected).double(), rtol=3e-5, atol=1e-6)


@pytest.mark.parametrize("correction", [True, False])
def test_moving_averages_over_several_batches(correction: bool) -> None:
    objective = AlphaDpo(AlphaDpoConfig(preset="official", ema_bias_correction=correction))
    state = objective.initial_state()
    mean = spread = 0.0
    for step in range(6):
        pairs = random_pairs(7 + step, seed=20 + step)
        gaps = gaps_of(pairs, per_token=True)
        mean = 0.9 * mean + 0.1 * statistics.fmean(gaps)
        spread = 0.9 * spread + 0.1 * statistics.stdev(gaps)
        weight = sum(0.1 * 0.9**age for age in range(step + 1)) if correction else 1.0
        prepared = objective.prepare(batch_of(pairs), state)
        z = [(gap - mean / weight) / (spread / weight) for gap in gaps]
        assert prepared["z"].tolist() == pytest.approx(z, rel=1e-11)
        assert prepared["z"].dtype == torch.float64
        state = objective.advance(state, prepared, {})


def test_the_released_averages_start_at_a_tenth() -> None:
    pairs = make_pairs([-10.0, -12.0], [-10.0, -10.0], ([1, 1], [1, 1]), ref=([-20.0, -20.0], [-10.0, -10.0]))
    official = AlphaDpo(AlphaDpoConfig(preset="official"))
    z = official.prepare(batch_of(pairs), official.initial_state())["z"].tolist()
    # Gaps 10 and 8: mean 9, spread sqrt 2, a tenth of both in use.
    assert z == pytest.approx([9.1 / (0.1 * math.sqrt(2.0)), 7.1 / (0.1 * math.sqrt(2.0))])
    corrected = AlphaDpo(AlphaDpoConfig(gap_statistics="ema"))
    z = corrected.prepare(batch_of(pairs), corrected.initial_state())["z"].tolist()
    assert z == pytest.approx([1.0 / math.sqrt(2.0), -1.0 / math.sqrt(2.0)])


def test_a_state_written_to_json_continues_to_the_last_bit() -> None:
    objective = AlphaDpo(AlphaDpoConfig(preset="official"))
    kept = read_back = objective.initial_state()
    for step in range(5):
        batch = batch_of(random_pairs(9, seed=step))
        read_back = json.loads(json.dumps(read_back))
        prepared, again = objective.prepare(batch, kept), objective.prepare(batch, read_back)
        assert all(torch.equal(prepared[name], again[name]) for name in prepared)
        kept, read_back = objective.advance(kept, prepared, {}), objective.advance(read_back, again, {})
    assert kept == read_back
    assert all(type(value) is float for value in kept.values())
    assert kept["num_batches"] == 5.0


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_neither_preparing_nor_calling_changes_the_state(preset: str) -> None:
    objective = AlphaDpo(AlphaDpoConfig(preset=preset))  # type: ignore[arg-type]
    state = objective.advance(
        objective.initial_state(), objective.prepare(batch_of(random_pairs(5, 1)), objective.initial_state()), {}
    )
    before = dict(state)
    objective(with_prepared(objective, random_pairs(7, seed=2), MappingProxyType(state)))
    assert dict(state) == before
    assert (preset == "paper") == (state == {})


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_a_batch_cut_anywhere_gives_the_same_losses(preset: str) -> None:
    objective = AlphaDpo(AlphaDpoConfig(preset=preset))  # type: ignore[arg-type]
    pairs = with_prepared(objective, random_pairs(11, seed=8))
    whole = objective(pairs)
    parts = [objective(part) for part in cut(pairs, 3, 4, 10)]
    assert torch.equal(torch.cat([part.losses for part in parts]), whole.losses)
    for name, values in whole.metrics.items():
        assert torch.equal(torch.cat([part.metrics[name] for part in parts]), values)


def at_the_reference(num_pairs: int, noise: float) -> PairLogps:
    pairs = random_pairs(num_pairs, seed=4)
    generator = torch.Generator().manual_seed(9)
    shifts = noise * torch.randn(2, num_pairs, generator=generator)
    chosen, rejected = pairs.chosen_logps.detach(), pairs.rejected_logps.detach()
    return dataclasses.replace(pairs, ref_chosen_logps=chosen + shifts[0], ref_rejected_logps=rejected + shifts[1])


@pytest.mark.parametrize("preset", ["paper", "official"])
@pytest.mark.parametrize(("num_pairs", "noise"), [(13, 0.0), (1, 0.0), (1, 1.0)])
def test_without_spread_the_margin_is_that_of_simpo(preset: str, num_pairs: int, noise: float) -> None:
    objective = AlphaDpo(AlphaDpoConfig(preset=preset))  # type: ignore[arg-type]
    state = objective.initial_state()
    for _ in range(2):
        pairs = at_the_reference(num_pairs, noise)
        prepared = objective.prepare(batch_of(pairs), state)
        assert prepared["z"].tolist() == [0.0] * num_pairs
        output = objective(dataclasses.replace(pairs, batch=prepared))
        assert output.metrics["gamma"].tolist() == pytest.approx([0.75] * num_pairs)
        output.losses.sum().backward()
        assert all(gradient.isfinite().all() for gradient in gradients(pairs))
        state = objective.advance(state, prepared, {})


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_rounding_at_the_first_step_makes_no_margins(preset: str) -> None:
    # 1e-5 on sums of a hundred: a plain z-score would be of order one.
    objective = AlphaDpo(AlphaDpoConfig(preset=preset))  # type: ignore[arg-type]
    prepared = objective.prepare(batch_of(at_the_reference(64, 1e-5)), objective.initial_state())
    assert 0.0 < prepared["z"].abs().max().item() < 0.02
    if preset == "paper":
        gaps = torch.tensor(gaps_of(at_the_reference(64, 1e-5), per_token=False)).double()
        torch.testing.assert_close(prepared["z"], (gaps - gaps.mean()) / 0.1)


@pytest.mark.parametrize("length_normalization", [True, False])
def test_one_token_equal_and_long_responses(length_normalization: bool) -> None:
    sums, ref = (
        ([-5000.0, -1.0, -7.0, -3.0], [-1.0, -5000.0, -7.0, -9.0]),
        ([-5100.0, -2.0, -7.5, -3.0], [-1.5, -4900.0, -7.5, -8.0]),
    )
    pairs = make_pairs(*sums, ([2000, 1, 3, 1], [1, 2000, 3, 1]), ref=ref)
    objective = AlphaDpo(AlphaDpoConfig(length_normalization=length_normalization, label_smoothing=0.1))
    output = objective(with_prepared(objective, pairs))
    # 100 - 0.5, 1 + 100, 0.5 - 0.5, 0 + 1.
    assert output.metrics["gap"].tolist() == pytest.approx([99.5, 101.0, 0.0, 1.0])
    output.losses.sum().backward()
    for tensor in (output.losses, *gradients(pairs), *output.metrics.values()):
        assert torch.isfinite(tensor).all()
    assert output.metrics["rewards/margins"][2].item() == 0.0


def test_needs_and_metrics() -> None:
    objective = AlphaDpo()
    assert objective.needs == LogpNeeds(reference=True, batch=True)
    output = objective(with_prepared(objective, random_pairs(3, seed=1)))
    assert output.losses.requires_grad
    assert output.losses.dtype == torch.float32
    assert not any(values.requires_grad for values in output.metrics.values())
    assert set(output.distributions) <= set(output.metrics)


@pytest.mark.parametrize(
    ("options", "switches"),
    [
        ({}, ("paper", "alpha", "sum", "batch", None)),
        ({"preset": "official"}, ("official", "beta_alpha", "mean", "ema", False)),
        ({"preset": "official", "ema_bias_correction": True}, ("official", "beta_alpha", "mean", "ema", True)),
        ({"preset": "official", "gap_statistics": "batch"}, ("official", "beta_alpha", "mean", "batch", None)),
        ({"length_normalization": False}, ("paper", "alpha", None, "batch", None)),
        ({"gap_statistics": "ema"}, ("paper", "alpha", "sum", "ema", True)),
        # All four as the released code has them, whoever sets them; three leave the fourth to the paper.
        ({**OFFICIAL_SWITCHES, "ema_bias_correction": False}, ("official", "beta_alpha", "mean", "ema", False)),
        (OFFICIAL_SWITCHES, ("paper", "beta_alpha", "mean", "ema", True)),
        (
            {"length_normalization": False, "z_scale": "beta_alpha", "gap_statistics": "ema"},
            ("paper", "beta_alpha", None, "ema", True),
        ),
    ],
)
def test_presets_fill_the_switches_and_a_saved_configuration_builds_again(
    options: dict[str, Any], switches: tuple[Any, ...]
) -> None:
    config = AlphaDpoConfig(**options)
    found = (config.preset, config.z_scale, config.gap_normalization, config.gap_statistics, config.ema_bias_correction)
    assert found == switches
    assert AlphaDpoConfig(**dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preset": "paperr"}, ["preset", "paper, official"]),
        ({"z_scale": "beta"}, ["z_scale", "alpha, beta_alpha"]),
        ({"gap_statistics": "run"}, ["gap_statistics", "batch, ema"]),
        ({"gap_normalization": "average"}, ["gap_normalization", "sum, mean"]),
        ({"beta": 0.0}, ["beta", "greater than 0"]),
        ({"alpha": 0.0}, ["alpha 0", "objective simpo"]),
        ({"alpha": -0.1}, ["alpha", "at least 0"]),
        ({"gamma_beta_ratio": math.nan}, ["gamma_beta_ratio", "nan"]),
        ({"label_smoothing": 0.6}, ["label_smoothing", "at least 0 and at most 0.5"]),
        ({"length_normalization": 1}, ["length_normalization", "true or false"]),
        ({"ema_bias_correction": True}, ["ema_bias_correction", "would do nothing", "no moving average"]),
        ({"gap_statistics": "ema", "ema_bias_correction": "on"}, ["ema_bias_correction", "true or false"]),
        ({"length_normalization": False, "gap_normalization": "sum"}, ["gap_normalization", "would do nothing"]),
        (
            {"preset": "official", "z_scale": "alpha", "gap_normalization": "sum", "gap_statistics": "batch"},
            ["preset 'official' would do nothing", "give preset 'paper'"],
        ),
        (
            {"preset": "paper", **OFFICIAL_SWITCHES, "ema_bias_correction": False},
            ["preset 'paper' would do nothing", "ema_bias_correction off", "give preset 'official'"],
        ),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        AlphaDpoConfig(**options)
    assert all(word in str(error.value) for word in words), error.value
