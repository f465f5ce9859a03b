"""AOT against sorted float64 columns and their gradient, however the batch is cut or its responses are paired."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from torch import Tensor

from megatron_rmipo.objectives.aot_pair import AotPair, AotPairConfig
from megatron_rmipo.objectives.base import LogpNeeds, PairLogps
from megatron_rmipo.objectives.registry import build_objective
from tests.objectives.batches import cut, gradients, with_prepared
from tests.objectives.float64 import numbers_of, run_with_gradients, softplus
from tests.objectives.pairs import make_pairs, random_pairs


def sorted_loss(pairs: PairLogps, beta: float, label_smoothing: float) -> tuple[float, Tensor, Tensor]:
    """The loss of the batch from sorted columns, in float64, and its gradients through the sorting, times the number of pairs."""
    n = numbers_of(pairs)
    delta = beta * ((n.lw - n.rw).sort().values - (n.ll - n.rl).sort().values)
    losses = (1.0 - label_smoothing) * torch.log1p(torch.exp(-delta)) + label_smoothing * torch.log1p(torch.exp(delta))
    chosen, rejected = torch.autograd.grad(losses.sum(), (n.lw, n.ll))
    return losses.mean().item(), chosen, rejected


def test_hand_worked_batch() -> None:
    # Log-ratios of the chosen 3, 1 and of the rejected 2, -4: by rank 1 against -4, 3 against 2.
    pairs = make_pairs([-7.0, -9.0], [-8.0, -14.0], ([5, 4], [6, 3]), ref=([-10.0, -10.0], [-10.0, -10.0]))
    objective = AotPair(AotPairConfig(beta=0.5))
    output, chosen, rejected = run_with_gradients(objective, with_prepared(objective, pairs))
    near, far = softplus(-0.5), softplus(-2.5)
    # Pair 0 has the chosen and the rejected of the upper rank, pair 1 both of the lower one.
    assert output.losses.tolist() == pytest.approx([near, far])
    assert output.losses.mean().item() == pytest.approx((near + far) / 2.0)
    slopes = [-0.5 / (1.0 + math.exp(0.5)), -0.5 / (1.0 + math.exp(2.5))]
    assert chosen.tolist() == pytest.approx(slopes)
    assert rejected.tolist() == pytest.approx([-slope for slope in slopes])
    assert output.metrics["aot/accuracies"].tolist() == [1.0, 1.0]
    # The rejected ones exchanged: the same ranks, each shared by two pairs now.
    exchanged = dataclasses.replace(pairs, rejected_logps=pairs.rejected_logps.detach().flip(0).requires_grad_())
    output, again, other = run_with_gradients(objective, with_prepared(objective, exchanged))
    assert output.losses.tolist() == pytest.approx([(near + far) / 2.0] * 2)
    assert torch.equal(again, chosen)
    assert torch.equal(other, rejected.flip(0))


@pytest.mark.parametrize(("beta", "label_smoothing"), [(0.3, 0.0), (0.7, 0.15)])
def test_the_batch_has_the_value_and_gradient_of_the_sorted_loss(beta: float, label_smoothing: float) -> None:
    objective = AotPair(AotPairConfig(beta=beta, label_smoothing=label_smoothing))
    pairs = with_prepared(objective, random_pairs(31, seed=7))
    loss, chosen, rejected = sorted_loss(pairs, beta, label_smoothing)
    whole = objective(pairs)
    assert whole.losses.mean().item() == pytest.approx(loss, rel=1e-5)
    # Nearly every rank joins responses of two pairs, or little would be tested.
    own = (pairs.rejected_logps.detach() - pairs.ref_rejected_logps).double()  # type: ignore[operator]
    assert int((pairs.batch["rejected_at_rank"] != own).sum()) > 25
    for part in cut(pairs, 3, 4, 29):
        objective(part).losses.sum().backward()
    for gradient, expected in zip(gradients(pairs), (chosen, rejected), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=3e-5, atol=1e-7)


def test_a_batch_cut_anywhere_gives_the_same_losses() -> None:
    objective = AotPair(AotPairConfig(label_smoothing=0.1))
    pairs = with_prepared(objective, random_pairs(11, seed=8))
    whole, parts = objective(pairs), [objective(part) for part in cut(pairs, 3, 4, 10)]
    assert torch.equal(torch.cat([part.losses for part in parts]), whole.losses)
    for name, values in whole.metrics.items():
        assert torch.equal(torch.cat([part.metrics[name] for part in parts]), values)


def test_one_pair_is_dpo_and_more_pairs_are_not() -> None:
    objective, dpo = AotPair(), build_objective("dpo", {})
    one, many = random_pairs(1, seed=3), random_pairs(13, seed=3)
    torch.testing.assert_close(objective(with_prepared(objective, one)).losses, dpo(one).losses)
    prepared = objective(with_prepared(objective, many))
    assert not torch.allclose(prepared.losses, dpo(many).losses, rtol=1e-2)
    # The sum over ranks of the differences is the sum over pairs, so the rewards' mean margin is that of DPO.
    assert torch.equal(prepared.metrics["rewards/margins"], dpo(many).metrics["rewards/margins"])


def test_equal_log_ratios_are_ranked_in_the_order_of_the_batch() -> None:
    same = [-10.0] * 4
    pairs = make_pairs(same, [-11.0, -9.0, -9.0, -12.0], ([3] * 4, [3] * 4), ref=(same, same))
    objective = AotPair()
    prepared = with_prepared(objective, pairs)
    assert prepared.batch["rejected_at_rank"].tolist() == [-2.0, -1.0, 1.0, 1.0]
    assert prepared.batch["chosen_at_rank"].tolist() == [0.0] * 4
    assert objective(prepared).metrics["aot/accuracies"].tolist() == [1.0, 1.0, 0.0, 0.0]


def test_policy_equal_to_reference_and_far_from_it() -> None:
    objective, pairs = AotPair(), random_pairs(9, seed=4)
    same = dataclasses.replace(
        pairs, ref_chosen_logps=pairs.chosen_logps.detach(), ref_rejected_logps=pairs.rejected_logps.detach()
    )
    output, chosen, rejected = run_with_gradients(objective, with_prepared(objective, same))
    assert output.losses.tolist() == pytest.approx([math.log(2.0)] * 9)
    assert chosen.tolist() == pytest.approx([-0.05] * 9)
    assert rejected.tolist() == pytest.approx([0.05] * 9)
    far = make_pairs([-5000.0, -1.0], [-1.0, -5000.0], ([2000, 1], [1, 2000]), ref=([-1.0, -5000.0], [-5000.0, -1.0]))
    output, *slopes = run_with_gradients(objective, with_prepared(objective, far))
    for tensor in (output.losses, *slopes, *output.metrics.values()):
        assert torch.isfinite(tensor).all()


def test_needs_and_refusals() -> None:
    assert AotPair().needs == LogpNeeds(reference=True, batch=True)
    assert AotPair().initial_state() == {}
    for options, words in (({"beta": -1.0}, "beta must be"), ({"label_smoothing": 0.7}, "label_smoothing must be")):
        with pytest.raises(ValueError, match=re.escape(words)):
            AotPairConfig(**options)
