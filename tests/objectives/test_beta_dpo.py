"""beta-DPO against numbers worked by hand, a float64 loop over batches, and the exact probabilities of its selection."""

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

from megatron_rmipo.objectives.base import LogpNeeds, PairLogps, State
from megatron_rmipo.objectives.beta_dpo import BetaDpo, BetaDpoConfig, draw_without_replacement
from tests.objectives.batches import batch_of, cut, gradients, with_prepared
from tests.objectives.float64 import gaps_of, softplus
from tests.objectives.pairs import make_pairs, random_pairs


def with_gaps(*gaps: float) -> PairLogps:
    """Pairs of the given gaps: the reference holds -50, the rejected response is where the reference has it."""
    same = [-50.0] * len(gaps)
    lengths = [25] * len(gaps)
    return make_pairs([-50.0 + gap for gap in gaps], same, (lengths, lengths), ref=(same, same))


def test_hand_worked_batch_of_which_all_are_selected() -> None:
    # State: nine batches, sums as if all had mean 1 and spread 2. This one has mean 3.
    weight = 1.0 - 0.9**9
    state = {"gap_mean": weight * 1.0, "gap_spread": weight * 2.0, "num_batches": 9.0}
    objective = BetaDpo(BetaDpoConfig(rho=0.0))
    output = objective(with_prepared(objective, with_gaps(2.0, 4.0), state))
    usual = (0.9 * weight * 1.0 + 0.1 * 3.0) / (1.0 - 0.9**10)
    beta = 0.1 * (1.0 + 0.6 * (3.0 - usual))
    assert output.metrics["beta"].tolist() == pytest.approx([beta, beta])
    assert output.metrics["gap"].tolist() == pytest.approx([2.0, 4.0])
    assert output.metrics["selected"].tolist() == [1.0, 1.0]
    assert output.metrics["rewards/chosen"].tolist() == pytest.approx([2.0 * beta, 4.0 * beta])
    assert output.metrics["rewards/rejected"].tolist() == [0.0, 0.0]
    assert output.losses.tolist() == pytest.approx([softplus(-2.0 * beta), softplus(-4.0 * beta)], rel=1e-6)


def test_beta_stays_above_its_least() -> None:
    # Gaps of mean -40 where 0 was usual (thirty batches): 1 + 0.6 * (-40 + 4) is far below 0.
    state = {"gap_mean": 0.0, "gap_spread": 5.0, "num_batches": 30.0}
    objective = BetaDpo(BetaDpoConfig(rho=0.0))
    assert objective.prepare(batch_of(with_gaps(-39.0, -41.0)), state)["beta"].item() == 1e-3


@pytest.mark.parametrize("filter_pairs", [True, False])
def test_losses_and_gradients_agree_with_float64(filter_pairs: bool) -> None:
    config = BetaDpoConfig(beta=0.3, beta_sensitivity=0.4, rho=0.35, filter_pairs=filter_pairs)
    objective, pairs = BetaDpo(config), random_pairs(29, seed=7)
    output = objective(with_prepared(objective, pairs))
    gaps, selected = gaps_of(pairs), output.metrics["selected"].tolist()
    assert sum(selected) == 18.0  # int(29 * 0.65)
    among = [gap for gap, taken in zip(gaps, selected, strict=True) if taken]
    beta = 0.3 * (1.0 + 0.4 * (statistics.fmean(among) - statistics.fmean(gaps)))
    assert output.metrics["beta"].tolist() == pytest.approx([beta] * 29)
    kept = [gap for gap, taken in zip(gaps, selected, strict=True) if taken or not filter_pairs]
    # The mean over the batch is the mean over the pairs trained on.
    assert output.losses.mean().item() == pytest.approx(statistics.fmean(softplus(-beta * gap) for gap in kept), rel=1e-5)
    output.losses.mean().backward()
    chosen, rejected = gradients(pairs)
    # No gradient through beta.
    slopes = [
        -beta / (1.0 + math.exp(beta * gap)) / len(kept) * (taken or not filter_pairs)
        for gap, taken in zip(gaps, selected, strict=True)
    ]
    torch.testing.assert_close(chosen, torch.tensor(slopes).double(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(rejected, -torch.tensor(slopes).double(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("correction", [True, False])
def test_moving_averages_over_several_batches(correction: bool) -> None:
    objective = BetaDpo(BetaDpoConfig(beta=50.0, ema_bias_correction=correction))
    state = objective.initial_state()
    mean = spread = 0.0
    for step in range(6):
        pairs = random_pairs(7 + step, seed=40 + step)
        gaps = gaps_of(pairs)
        mean = 0.9 * mean + 0.1 * statistics.fmean(gaps)
        spread = 0.9 * spread + 0.1 * statistics.stdev(gaps)
        prepared = objective.prepare(batch_of(pairs), state)
        weight = sum(0.1 * 0.9**age for age in range(step + 1)) if correction else 1.0
        among = [gap for gap, taken in zip(gaps, prepared["selected"].tolist(), strict=True) if taken]
        expected = 50.0 * (1.0 + 0.6 * (statistics.fmean(among) - mean / weight))
        assert prepared["beta"].item() == pytest.approx(max(1e-3, expected), rel=1e-11)
        state = objective.advance(state, prepared, {})
        assert state == pytest.approx({"gap_mean": mean, "gap_spread": spread, "num_batches": step + 1.0}, rel=1e-12)


def test_selection_weights_are_those_of_a_normal_around_the_usual_gap() -> None:
    # One of four, over many batch numbers. State of very many batches: M0 and spread stay 1 and 2 but for a tenth of the batch's.
    gaps, objective = (0.0, 1.0, 3.0, 9.0), BetaDpo(BetaDpoConfig(rho=0.75))
    usual, spread = 0.9 * 1.0 + 0.1 * statistics.fmean(gaps), 0.9 * 2.0 + 0.1 * statistics.stdev(gaps)
    weights = [math.exp(-0.5 * ((gap - usual) / spread) ** 2) for gap in gaps]
    counts, num_batches = torch.zeros(4, dtype=torch.float64), 4000
    batch = batch_of(with_gaps(*gaps))
    for number in range(num_batches):
        state = {"gap_mean": 1.0, "gap_spread": 2.0, "num_batches": 1000.0 + number}
        counts += objective.prepare(batch, state)["selected"]
    for count, weight in zip(counts.tolist(), weights, strict=True):
        share = weight / sum(weights)
        assert count / num_batches == pytest.approx(share, abs=4.0 * math.sqrt(share * (1.0 - share) / num_batches))


def test_selection_is_without_replacement() -> None:
    weights, num_drawn, num_draws = [0.5, 0.3, 0.15, 0.05], 2, 6000
    exact = dict.fromkeys(itertools.combinations(range(4), 2), 0.0)
    for first, second in itertools.permutations(range(4), 2):
        exact[min(first, second), max(first, second)] += weights[first] * weights[second] / (1.0 - weights[first])
    assert sum(exact.values()) == pytest.approx(1.0)
    # Only ratios count, however small the weights: exp(-5000) is 0 in any precision.
    log_weights = torch.tensor(weights, dtype=torch.float64).log() - 5000.0
    counts = dict.fromkeys(exact, 0)
    for seed in range(num_draws):
        drawn = draw_without_replacement(log_weights, num_drawn, seed=seed).nonzero().flatten().tolist()
        counts[tuple(drawn)] += 1  # type: ignore[index]
    for pair, share in exact.items():
        assert counts[pair] / num_draws == pytest.approx(share, abs=4.0 * math.sqrt(share * (1.0 - share) / num_draws))


@pytest.mark.parametrize(
    ("num_pairs", "rho", "expected"),
    [(10, 0.2, 8), (20, 0.8, 4), (7, 0.5, 3), (3, 0.9, 1), (1, 0.2, 1), (5, 0.99, 1), (5, 0.0, 5)],
)
def test_how_many_are_selected(num_pairs: int, rho: float, expected: int) -> None:
    prepared = BetaDpo(BetaDpoConfig(rho=rho)).prepare(batch_of(random_pairs(num_pairs, seed=1)), BetaDpo().initial_state())
    assert prepared["selected"].sum().item() == expected
    assert prepared["weight"].sum().item() == pytest.approx(num_pairs)


def steps(objective: BetaDpo, state: State, seeds: range, *, through_json: bool) -> tuple[list[dict[str, Any]], State]:
    results = []
    for seed in seeds:
        state = json.loads(json.dumps(state)) if through_json else state
        prepared = objective.prepare(batch_of(random_pairs(13, seed=seed)), state)
        results.append({name: values.tolist() for name, values in prepared.items()})
        state = objective.advance(state, prepared, {})
    return results, state


def test_a_state_written_to_json_continues_to_the_last_bit() -> None:
    objective = BetaDpo()
    whole, end = steps(objective, objective.initial_state(), range(6), through_json=False)
    again, read_back = steps(objective, objective.initial_state(), range(6), through_json=True)
    assert again == whole
    assert read_back == end
    assert end["num_batches"] == 6.0
    assert all(type(value) is float for value in end.values())


def test_each_batch_draws_anew_and_the_same_one_draws_the_same() -> None:
    objective, batch = BetaDpo(BetaDpoConfig(rho=0.5)), batch_of(random_pairs(40, seed=1))
    state = objective.initial_state()
    first, again = objective.prepare(batch, state), objective.prepare(batch, state)
    assert torch.equal(first["selected"], again["selected"])
    assert not torch.equal(first["selected"], objective.prepare(batch, {**state, "num_batches": 1.0})["selected"])


def test_neither_preparing_nor_calling_changes_the_state_or_the_generator() -> None:
    objective, state = BetaDpo(), {"gap_mean": 0.5, "gap_spread": 1.5, "num_batches": 4.0}
    generator_state = torch.get_rng_state()
    objective(with_prepared(objective, random_pairs(7, seed=2), MappingProxyType(state)))
    assert state == {"gap_mean": 0.5, "gap_spread": 1.5, "num_batches": 4.0}
    random_pairs(7, seed=2)
    assert torch.equal(torch.get_rng_state(), generator_state)


@pytest.mark.parametrize("filter_pairs", [True, False])
def test_a_batch_cut_anywhere_gives_the_same_losses(filter_pairs: bool) -> None:
    objective = BetaDpo(BetaDpoConfig(filter_pairs=filter_pairs, rho=0.5))
    pairs = with_prepared(objective, random_pairs(11, seed=8))
    whole = objective(pairs)
    parts = [objective(part) for part in cut(pairs, 3, 4, 10)]
    assert torch.equal(torch.cat([part.losses for part in parts]), whole.losses)
    for name, values in whole.metrics.items():
        assert torch.equal(torch.cat([part.metrics[name] for part in parts]), values)


@pytest.mark.parametrize("correction", [True, False])
@pytest.mark.parametrize("gaps", [(0.0,) * 10, (3.0,)])
def test_policy_equal_to_the_reference_and_a_batch_of_one(correction: bool, gaps: tuple[float, ...]) -> None:
    objective = BetaDpo(BetaDpoConfig(ema_bias_correction=correction))
    state = objective.initial_state()
    for _ in range(3):
        pairs = with_gaps(*gaps)
        prepared = objective.prepare(batch_of(pairs), state)
        output = objective(dataclasses.replace(pairs, batch=prepared))
        output.losses.mean().backward()
        for tensor in (output.losses, *gradients(pairs), *output.metrics.values()):
            assert torch.isfinite(tensor).all()
        state = objective.advance(state, prepared, {})
        if gaps[0] == 0.0:
            assert prepared["beta"].item() == pytest.approx(0.1)
            assert output.losses.mean().item() == pytest.approx(math.log(2.0))
        elif correction:
            # The mean gap of the selected pair is the usual one.
            assert output.losses.item() == pytest.approx(softplus(-0.3), rel=1e-6)


def test_rounding_at_the_first_step_selects_as_no_gaps_do() -> None:
    noise = (1e-5 * torch.randn(64, generator=torch.Generator().manual_seed(3))).tolist()
    objective = BetaDpo(BetaDpoConfig(rho=0.5))
    exact, rounded = (with_gaps(*gaps) for gaps in ([0.0] * 64, noise))
    selections = [objective.prepare(batch_of(pairs), objective.initial_state())["selected"] for pairs in (exact, rounded)]
    assert torch.equal(*selections)


def test_one_token_equal_and_long_responses() -> None:
    sums = ([-5000.0, -1.0, -7.0, -3.0], [-1.0, -5000.0, -7.0, -9.0])
    ref = ([-5100.0, -2.0, -7.5, -3.0], [-1.5, -4900.0, -7.5, -8.0])
    pairs = make_pairs(*sums, ([2000, 1, 3, 1], [1, 2000, 3, 1]), ref=ref)
    objective = BetaDpo(BetaDpoConfig(filter_pairs=False))
    output = objective(with_prepared(objective, pairs))
    assert output.metrics["gap"].tolist() == pytest.approx([99.5, 101.0, 0.0, 1.0])
    output.losses.sum().backward()
    for tensor in (output.losses, *gradients(pairs), *output.metrics.values()):
        assert torch.isfinite(tensor).all()


def test_needs_and_metrics() -> None:
    objective = BetaDpo()
    assert objective.needs == LogpNeeds(reference=True, batch=True)
    output = objective(with_prepared(objective, random_pairs(3, seed=1)))
    assert output.losses.requires_grad
    assert output.losses.dtype == torch.float32
    assert not any(values.requires_grad for values in output.metrics.values())
    assert set(output.distributions) <= set(output.metrics)
    assert "weight" not in BetaDpo(BetaDpoConfig(filter_pairs=False)).prepare(
        batch_of(random_pairs(3, seed=1)), objective.initial_state()
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 1e-4}, ["beta", "at least 0.001"]),
        ({"beta_sensitivity": -0.1}, ["beta_sensitivity", "at least 0"]),
        ({"rho": 1.0}, ["rho must be a number at least 0 and below 1, not 1.0"]),
        ({"filter_pairs": 1}, ["filter_pairs", "true or false"]),
        ({"ema_bias_correction": None}, ["ema_bias_correction", "true or false"]),
        ({"rho": 0.0, "filter_pairs": False}, ["filter_pairs off would do nothing", "rho 0"]),
        ({"beta_sensitivity": 0.0, "rho": 0.0}, ["beta_sensitivity 0 with rho 0", "objective dpo"]),
        ({"beta_sensitivity": 0.0, "filter_pairs": False}, ["filter_pairs off", "objective dpo"]),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        BetaDpoConfig(**options)
    assert all(word in str(error.value) for word in words), error.value
