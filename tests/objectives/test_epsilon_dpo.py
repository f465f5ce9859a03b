"""epsilon-DPO against numbers worked by hand, a float64 loop over pairs, and beta from step to step."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from types import MappingProxyType
from typing import Any

import pytest
import torch

from megatron_rmipo.objectives.base import BatchLogps, LogpNeeds, LossOutput, PairLogps, State
from megatron_rmipo.objectives.epsilon_dpo import EpsilonDpo, EpsilonDpoConfig
from tests.objectives.batches import cut, gradients
from tests.objectives.float64 import softplus
from tests.objectives.pairs import make_pairs, random_pairs


def perturbed(pairs: PairLogps, off: list[list[float]], towards: list[list[float]]) -> PairLogps:
    """The pairs with sums moved by the given nats: [chosen, rejected] off the reference, and towards it."""
    chosen, rejected = pairs.chosen_logps.detach(), pairs.rejected_logps.detach()
    return dataclasses.replace(
        pairs,
        extrapolated_chosen_logps=chosen + torch.tensor(off[0]),
        extrapolated_rejected_logps=rejected + torch.tensor(off[1]),
        interpolated_chosen_logps=chosen + torch.tensor(towards[0]),
        interpolated_rejected_logps=rejected + torch.tensor(towards[1]),
    )


def random_perturbed(num_pairs: int, seed: int) -> PairLogps:
    generator = torch.Generator().manual_seed(1000 + seed)
    shifts = torch.randn(2, 2, num_pairs, generator=generator).tolist()
    return perturbed(random_pairs(num_pairs, seed=seed), *shifts)


def prepared_for(objective: EpsilonDpo, num_pairs: int, state: State) -> dict[str, torch.Tensor]:
    """From a batch of which no log-probabilities are known, as the trainer has it."""
    return objective.prepare(BatchLogps(None, None, None, torch.ones(num_pairs, 2, dtype=torch.bool)), state)


def run(objective: EpsilonDpo, pairs: PairLogps, state: State | None = None) -> LossOutput:
    batch = prepared_for(objective, pairs.chosen_logps.shape[0], objective.initial_state() if state is None else state)
    return objective(dataclasses.replace(pairs, batch=batch))


def test_hand_worked_steps() -> None:
    # z = 5 in all. z+ and z-: 6 and 4 (grows), 4 and 6 (shrinks), 6 and 6, 4 and 4 (neither), and four with a tie.
    off, towards = [1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 0.0, 0.0], [-1.0, 1.0, 1.0, -1.0, 0.0, 0.0, -1.0, 1.0]
    same, lengths, zero = [-10.0] * 8, [4] * 8, [0.0] * 8
    pairs = make_pairs(same, [-15.0] * 8, (lengths, lengths), ref=([-12.0] * 8, [-15.0] * 8))
    by_chosen = perturbed(pairs, [off, zero], [towards, zero])
    by_rejected = perturbed(pairs, [zero, [-nats for nats in off]], [zero, [-nats for nats in towards]])
    # h = 2; beta 0.5 / 1.25 = 0.4, 0.5 / 0.75 = 0.6667, 0.5.
    betas = [0.4, 2.0 / 3.0, *[0.5] * 6]
    for moved in (by_chosen, by_rejected):
        output = run(EpsilonDpo(EpsilonDpoConfig(beta=0.5, epsilon=0.25)), moved)
        assert output.metrics["epsilon/step"].tolist() == [1.0, -1.0, *[0.0] * 6]
        assert output.losses.tolist() == pytest.approx([softplus(-2.0 * beta) for beta in betas], rel=1e-6)
        assert output.metrics["rewards/chosen"].tolist() == pytest.approx([2.0 * beta for beta in betas])
        assert output.metrics["rewards/rejected"].tolist() == zero
        assert output.metrics["beta"].tolist() == pytest.approx([0.5] * 8)


def test_losses_and_gradients_agree_with_float64() -> None:
    objective, pairs = EpsilonDpo(EpsilonDpoConfig(beta=0.7, epsilon=0.2)), random_perturbed(29, seed=7)
    output = run(objective, pairs)
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    names += ("extrapolated_chosen_logps", "extrapolated_rejected_logps")
    names += ("interpolated_chosen_logps", "interpolated_rejected_logps")
    losses, slopes, steps = [], [], []
    for lw, ll, rw, rl, ew, el, iw, il in zip(*(getattr(pairs, name).double().tolist() for name in names), strict=True):
        order = (iw - il, lw - ll, ew - el)
        step = 1 if order[0] < order[1] < order[2] else -1 if order[0] > order[1] > order[2] else 0
        beta, h = 0.7 / (1.0 + 0.2 * step), (lw - rw) - (ll - rl)
        losses.append(softplus(-beta * h))
        slopes.append(-beta / (1.0 + math.exp(beta * h)))
        steps.append(float(step))
    assert set(steps) == {-1.0, 0.0, 1.0}
    assert output.metrics["epsilon/step"].tolist() == steps
    torch.testing.assert_close(output.losses.double(), torch.tensor(losses).double(), rtol=1e-5, atol=1e-6)
    output.losses.sum().backward()
    chosen, rejected = gradients(pairs)
    torch.testing.assert_close(chosen, torch.tensor(slopes).double(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(rejected, -torch.tensor(slopes).double(), rtol=1e-5, atol=1e-7)


def test_beta_follows_the_mean_step_of_the_batch() -> None:
    objective = EpsilonDpo(EpsilonDpoConfig(beta=0.3, epsilon=0.1))
    state, beta = objective.initial_state(), 0.3
    for step in range(5):
        pairs = random_perturbed(7 + step, seed=step)
        output = run(objective, pairs, state)
        assert output.metrics["beta"].tolist() == pytest.approx([beta] * (7 + step))
        steps = output.metrics["epsilon/step"].tolist()
        state = objective.advance(state, prepared_for(objective, 7 + step, state), output.metrics)
        beta = beta / (1.0 + 0.1 * math.fsum(steps) / len(steps))
        assert state["beta"] == pytest.approx(beta, rel=1e-14)
    assert beta != pytest.approx(0.3, rel=0.01)


def test_beta_falls_by_at_most_one_plus_epsilon_and_rises_by_at_most_one_minus_epsilon() -> None:
    objective = EpsilonDpo(EpsilonDpoConfig(beta=0.3, epsilon=0.1))
    for step, expected in ((1.0, 0.3 / 1.1), (-1.0, 0.3 / 0.9), (0.0, 0.3)):
        state = objective.advance({"beta": 0.3}, {}, {"epsilon/step": torch.full((3,), step)})
        assert state == pytest.approx({"beta": expected}, rel=1e-14)


def test_a_state_written_to_json_continues_to_the_last_bit() -> None:
    objective = EpsilonDpo()
    kept = read_back = objective.initial_state()
    for step in range(6):
        pairs = random_perturbed(13, seed=step)
        read_back = json.loads(json.dumps(read_back))
        output, again = run(objective, pairs, kept), run(objective, pairs, read_back)
        assert torch.equal(output.losses, again.losses)
        kept, read_back = (objective.advance(state, {}, output.metrics) for state in (kept, read_back))
    assert read_back == kept
    assert kept != objective.initial_state()
    assert type(kept["beta"]) is float


def test_neither_preparing_nor_calling_changes_the_state() -> None:
    objective, state = EpsilonDpo(), {"beta": 0.02}
    output = run(objective, random_perturbed(7, seed=2), MappingProxyType(state))
    objective.advance(MappingProxyType(state), {}, output.metrics)
    assert state == {"beta": 0.02}


def test_a_batch_cut_anywhere_gives_the_same_losses() -> None:
    objective = EpsilonDpo(EpsilonDpoConfig(epsilon=0.3))
    pairs = dataclasses.replace(random_perturbed(11, seed=8), batch=prepared_for(objective, 11, objective.initial_state()))
    whole = objective(pairs)
    parts = [objective(part) for part in cut(pairs, 3, 4, 10)]
    assert torch.equal(torch.cat([part.losses for part in parts]), whole.losses)
    for name, values in whole.metrics.items():
        assert torch.equal(torch.cat([part.metrics[name] for part in parts]), values)


@pytest.mark.parametrize("num_pairs", [1, 5])
def test_policy_equal_to_the_reference(num_pairs: int) -> None:
    pairs = random_pairs(num_pairs, seed=4)
    chosen, rejected, zero = pairs.chosen_logps.detach(), pairs.rejected_logps.detach(), [[0.0] * num_pairs] * 2
    pairs = perturbed(dataclasses.replace(pairs, ref_chosen_logps=chosen, ref_rejected_logps=rejected), zero, zero)
    objective = EpsilonDpo()
    output = run(objective, pairs)
    assert output.losses.tolist() == pytest.approx([math.log(2.0)] * num_pairs)
    assert output.metrics["epsilon/step"].tolist() == [0.0] * num_pairs
    assert objective.advance({"beta": 0.01}, {}, output.metrics) == {"beta": 0.01}
    output.losses.sum().backward()
    assert gradients(pairs)[0].tolist() == pytest.approx([-0.005] * num_pairs)


def test_one_token_equal_and_long_responses() -> None:
    sums = ([-5000.0, -1.0, -7.0, -3.0], [-1.0, -5000.0, -7.0, -9.0])
    ref = ([-5100.0, -2.0, -7.5, -3.0], [-1.5, -4900.0, -7.5, -8.0])
    pairs = make_pairs(*sums, ([2000, 1, 3, 1], [1, 2000, 3, 1]), ref=ref)
    pairs = perturbed(pairs, [[1.0, 0.1, 0.0, 0.1], [0.0] * 4], [[-1.0, -0.1, 0.0, 0.1], [0.0] * 4])
    output = run(EpsilonDpo(EpsilonDpoConfig(beta=0.1)), pairs)
    assert output.metrics["epsilon/step"].tolist() == [1.0, 1.0, 0.0, 0.0]
    expected = [softplus(-99.5 * 0.1 / 1.01), softplus(-101.0 * 0.1 / 1.01), math.log(2.0), softplus(-0.1)]
    assert output.losses.tolist() == pytest.approx(expected, rel=1e-5)
    output.losses.sum().backward()
    for tensor in (output.losses, *gradients(pairs), *output.metrics.values()):
        assert torch.isfinite(tensor).all()


def test_needs_and_metrics() -> None:
    objective = EpsilonDpo(EpsilonDpoConfig(epsilon=0.02))
    assert objective.needs == LogpNeeds(perturbation=0.02)
    assert objective.initial_state() == {"beta": 0.01}
    output = run(objective, random_perturbed(3, seed=1))
    assert output.losses.requires_grad
    assert output.losses.dtype == torch.float32
    assert not any(values.requires_grad for values in output.metrics.values())
    assert set(output.distributions) <= set(output.metrics)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.0}, ["beta", "greater than 0"]),
        ({"epsilon": 0.0}, ["epsilon must be a number greater than 0 and below 1, not 0.0"]),
        ({"epsilon": 1.0}, ["epsilon", "below 1"]),
        ({"epsilon": 1.5}, ["epsilon", "greater than 0 and below 1"]),
        ({"epsilon": math.nan}, ["epsilon", "nan"]),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        EpsilonDpoConfig(**options)
    assert all(word in str(error.value) for word in words), error.value
