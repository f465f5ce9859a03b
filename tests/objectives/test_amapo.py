"""AMaPO against numbers worked by hand and a float64 formula, and its limits."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from megatron_rmipo.objectives.amapo import Amapo, AmapoConfig
from megatron_rmipo.objectives.base import LogpNeeds
from megatron_rmipo.objectives.simpo import Simpo, SimpoConfig
from tests.objectives.batches import cut, gradients, with_prepared
from tests.objectives.float64 import numbers_of, run_with_gradients, softplus
from tests.objectives.pairs import make_pairs, random_pairs


def test_hand_worked_batch() -> None:
    # r = -1 + 2 = 1, -2 + 2 = 0 and -1 + 3 = 2: mean 1, unbiased spread 1. The second lies one spread below: m = 3 e.
    pairs = make_pairs([-2.0, -2.0, -3.0], [-2.0, -4.0, -3.0], ([2, 1, 3], [1, 2, 1]))
    output = Amapo()(with_prepared(Amapo(), pairs))
    assert output.metrics["gamma"].tolist() == pytest.approx([0.0, 3.0 * math.e, 0.0])
    assert output.metrics["amapo/below_mean"].tolist() == [0.0, 1.0, 0.0]
    assert output.losses.tolist() == pytest.approx([softplus(-3.0), softplus(3.0 * math.e), softplus(-6.0)], rel=1e-6)
    assert output.metrics["rewards/margins"].tolist() == pytest.approx([3.0, 0.0, 6.0])


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_losses_and_gradients_agree_with_float64(shift: float) -> None:
    # Means of either sign: margins that shrink, and that grow, with the distance from it.
    pairs = random_pairs(31, seed=71)
    pairs = make_pairs(
        (pairs.chosen_logps.detach() + shift * pairs.chosen_lengths).tolist(),
        pairs.rejected_logps.tolist(),
        (pairs.chosen_lengths.int().tolist(), pairs.rejected_lengths.int().tolist()),
    )
    n = numbers_of(pairs)
    gaps = (n.bar_lw - n.bar_ll).tolist()
    mean, spread = statistics.fmean(gaps), statistics.stdev(gaps)
    margins = [1.7 * math.exp((mean - gap) / spread * mean) if gap < mean else 0.0 for gap in gaps]
    logits = [1.7 * gap - margin for gap, margin in zip(gaps, margins, strict=True)]
    objective = Amapo(AmapoConfig(beta=1.7, label_smoothing=0.13))
    output = objective(with_prepared(objective, pairs))
    assert output.metrics["gamma"].tolist() == pytest.approx(margins, rel=1e-5)
    assert output.losses.tolist() == pytest.approx([0.87 * softplus(-z) + 0.13 * softplus(z) for z in logits], rel=2e-5)
    # No gradient flows through the margin.
    output.losses.sum().backward()
    slopes = torch.tensor([1.7 * (0.13 - 1.0 / (1.0 + math.exp(z))) for z in logits], dtype=torch.float64)
    chosen, rejected = gradients(pairs)
    torch.testing.assert_close(chosen, slopes / n.nw, rtol=3e-5, atol=1e-7)
    torch.testing.assert_close(rejected, -slopes / n.nl, rtol=3e-5, atol=1e-7)


def test_a_batch_may_be_cut_anywhere() -> None:
    pairs = with_prepared(Amapo(), random_pairs(11, seed=72))
    assert torch.equal(torch.cat([Amapo()(part).losses for part in cut(pairs, 2, 9)]), Amapo()(pairs).losses)
    assert Amapo().needs == LogpNeeds(batch=True)


@pytest.mark.parametrize("count", [1, 7])
def test_where_nothing_spreads_there_is_no_margin(count: int) -> None:
    # 0.1 in float64 does not add up to a mean of 0.1: rounding must not decide who is below it.
    pairs = make_pairs([-0.9] * count, [-1.0] * count, ([1] * count, [1] * count))
    output = Amapo()(with_prepared(Amapo(), pairs))
    simpo = Simpo(SimpoConfig(beta=3.0, gamma_beta_ratio=0.0))(pairs)
    assert torch.equal(output.losses, simpo.losses)


def test_no_margin_overflows() -> None:
    # A gap of 50 nats per token in most pairs, and one far below: an exponent of hundreds.
    pairs = make_pairs([-1.0] * 40, [-51.0] * 39 + [-1.5], ([1] * 40, [1] * 40))
    output, chosen, _ = run_with_gradients(Amapo(), with_prepared(Amapo(), pairs))
    assert torch.isfinite(output.losses).all()
    assert chosen[-1].item() == pytest.approx(-3.0)
    assert output.metrics["gamma"][-1].item() > 3.0 * math.exp(30.0)


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"label_smoothing": 0.6}])
def test_options_outside_their_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        AmapoConfig(**options)
