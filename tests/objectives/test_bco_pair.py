"""BCO on pairs against numbers worked by hand, a running mean written by hand, and float64."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from types import MappingProxyType
from typing import Any

import pytest
import torch

from megatron_rmipo.objectives.base import LogpNeeds
from megatron_rmipo.objectives.bco_pair import BcoPair, BcoPairConfig
from tests.objectives.batches import batch_of, cut, gradients, with_prepared
from tests.objectives.float64 import numbers_of, softplus
from tests.objectives.pairs import make_pairs, random_pairs

# Log-ratios 2 and -1, 4 and 1: at beta 0.5 rewards 1 and -0.5, 2 and 0.5, mean 0.75.
HAND: dict[str, Any] = {"chosen": [-6.0, -5.0], "rejected": [-10.0, -7.0], "lengths": ([4, 3], [5, 2])}
HAND_REF = ([-8.0, -9.0], [-9.0, -8.0])


def test_hand_worked_batches() -> None:
    objective = BcoPair(BcoPairConfig(beta=0.5))
    pairs = make_pairs(**HAND, ref=HAND_REF)
    first = objective(with_prepared(objective, pairs))
    assert first.metrics["bco/delta"].tolist() == [0.75, 0.75]
    assert first.metrics["rewards/margins"].tolist() == [1.5, 1.5]
    assert first.losses.tolist() == pytest.approx([softplus(-0.25) + softplus(-1.25), softplus(-1.25) + softplus(-0.25)])
    # Three batches of mean -0.25 before: (3 * -0.25 + 0.75) / 4 = 0.
    state = {"delta": -0.25, "num_batches": 3.0}
    later = objective(with_prepared(objective, pairs, state))
    assert later.metrics["bco/delta"].tolist() == [0.0, 0.0]
    assert later.losses.tolist() == pytest.approx([softplus(-1.0) + softplus(-0.5), softplus(-2.0) + softplus(0.5)])


@pytest.mark.parametrize("reward_shift", ["running_mean", "none"])
def test_losses_and_gradients_agree_with_float64(reward_shift: str) -> None:
    objective = BcoPair(BcoPairConfig(beta=0.3, reward_shift=reward_shift))  # type: ignore[arg-type]
    pairs = random_pairs(29, seed=7)
    n = numbers_of(pairs)
    chosen, rejected = (0.3 * (n.lw - n.rw)).tolist(), (0.3 * (n.ll - n.rl)).tolist()
    delta = statistics.fmean(chosen + rejected) if reward_shift == "running_mean" else 0.0
    output = objective(with_prepared(objective, pairs))
    expected = [softplus(delta - w) + softplus(r - delta) for w, r in zip(chosen, rejected, strict=True)]
    torch.testing.assert_close(output.losses.double(), torch.tensor(expected).double(), rtol=2e-5, atol=2e-6)
    output.losses.sum().backward()
    # The slope holds delta constant: no gradient flows through it.
    slopes = (
        [-0.3 / (1.0 + math.exp(w - delta)) for w in chosen],
        [0.3 / (1.0 + math.exp(delta - r)) for r in rejected],
    )
    for gradient, slope in zip(gradients(pairs), slopes, strict=True):
        torch.testing.assert_close(gradient, torch.tensor(slope).double(), rtol=3e-5, atol=1e-7)


def test_the_shift_is_the_mean_of_all_batches_so_far_whatever_their_size() -> None:
    objective = BcoPair(BcoPairConfig(beta=0.2))
    state, means = objective.initial_state(), []
    for step in range(5):
        pairs = random_pairs(3 + 2 * step, seed=30 + step)
        n = numbers_of(pairs)
        means.append(statistics.fmean((0.2 * (n.lw - n.rw)).tolist() + (0.2 * (n.ll - n.rl)).tolist()))
        prepared = objective.prepare(batch_of(pairs), MappingProxyType(state))
        assert prepared["delta"].item() == pytest.approx(statistics.fmean(means), rel=1e-12)
        state = objective.advance(state, prepared, {})
        assert state == pytest.approx({"delta": statistics.fmean(means), "num_batches": step + 1.0}, rel=1e-12)


def test_a_state_written_to_json_continues_to_the_last_bit() -> None:
    objective = BcoPair()
    kept = read_back = objective.initial_state()
    for step in range(4):
        batch = batch_of(random_pairs(9, seed=step))
        read_back = json.loads(json.dumps(read_back))
        prepared, again = objective.prepare(batch, kept), objective.prepare(batch, read_back)
        assert torch.equal(prepared["delta"], again["delta"])
        kept, read_back = objective.advance(kept, prepared, {}), objective.advance(read_back, again, {})
    assert kept == read_back


def test_a_batch_cut_anywhere_gives_the_same_losses() -> None:
    objective = BcoPair()
    pairs = with_prepared(objective, random_pairs(11, seed=8))
    whole, parts = objective(pairs), [objective(part) for part in cut(pairs, 3, 4, 10)]
    assert torch.equal(torch.cat([part.losses for part in parts]), whole.losses)
    for name, values in whole.metrics.items():
        assert torch.equal(torch.cat([part.metrics[name] for part in parts]), values)


def test_policy_equal_to_reference_and_far_from_it() -> None:
    objective, pairs = BcoPair(), random_pairs(9, seed=4)
    same = dataclasses.replace(
        pairs, ref_chosen_logps=pairs.chosen_logps.detach(), ref_rejected_logps=pairs.rejected_logps.detach()
    )
    output = objective(with_prepared(objective, same))
    assert output.losses.tolist() == pytest.approx([2.0 * math.log(2.0)] * 9)
    far = make_pairs([-5000.0, -1.0], [-1.0, -5000.0], ([2000, 1], [1, 2000]), ref=([-1.0, -5000.0], [-5000.0, -1.0]))
    output = objective(with_prepared(objective, far))
    output.losses.sum().backward()
    for tensor in (output.losses, *gradients(far), *output.metrics.values()):
        assert torch.isfinite(tensor).all()


def test_without_a_shift_nothing_is_carried_and_no_pass_is_needed() -> None:
    assert BcoPair().needs == LogpNeeds(reference=True, batch=True)
    plain = BcoPair(BcoPairConfig(reward_shift="none"))
    assert plain.needs == LogpNeeds(reference=True)
    assert plain.initial_state() == {}
    assert plain.advance({}, {}, {}) == {}
    output = plain(random_pairs(3, seed=1))
    assert "bco/delta" not in output.metrics
    assert not any(values.requires_grad for values in output.metrics.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.0}, ["beta", "greater than 0"]),
        ({"reward_shift": "ema"}, ["reward_shift must be one of running_mean, none, not 'ema'"]),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        BcoPairConfig(**options)
    assert all(word in str(error.value) for word in words), error.value
