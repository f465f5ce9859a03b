"""KTO against numbers worked by hand, a float64 loop over responses, and rows with one response."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
import torch

from megatron_rmipo.objectives.base import BatchLogps, LogpNeeds, PairLogps
from megatron_rmipo.objectives.kto import Kto, KtoConfig
from tests.objectives.batches import batch_of, cut, gradients
from tests.objectives.pairs import make_pairs, random_pairs


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def with_z(pairs: PairLogps, z: float) -> PairLogps:
    return dataclasses.replace(pairs, batch={"z": torch.tensor(z, dtype=torch.float64)})


# Two rows with one response: desirable with Lw - Rw = 2 over 4 tokens, undesirable with Ll - Rl = -1 over 2.
UNPAIRED: dict[str, Any] = {"chosen": [-6.0, 0.0], "rejected": [0.0, -5.0], "lengths": ([4, 0], [0, 2])}
UNPAIRED_REF = ([-8.0, 0.0], [0.0, -4.0])


def test_hand_worked_pair() -> None:
    # beta 0.1: Lw - Rw = 2, Ll - Rl = -1, z = 0.05. 1 - sig(0.2 - 0.05) and 1 - sig(0.05 + 0.1), both 1 - sig(0.15) = 0.462570.
    pairs = with_z(make_pairs([-6.0], [-5.0], ([3], [4]), ref=([-8.0], [-4.0])), 0.05)
    output = Kto()(pairs)
    assert output.losses.item() == pytest.approx(0.4625702, abs=1e-6)
    assert output.metrics["rewards/chosen"].item() == pytest.approx(0.2)
    assert output.metrics["rewards/rejected"].item() == pytest.approx(-0.1)
    assert output.metrics["rewards/margins"].item() == pytest.approx(0.3)
    assert output.metrics["kto/z"].item() == pytest.approx(0.05)
    weighted = Kto(KtoConfig(desirable_weight=3.0, undesirable_weight=0.5))(pairs)
    assert weighted.losses.item() == pytest.approx(0.4625702 * 1.75, abs=1e-6)


def test_both_terms_fall_as_the_right_response_gains() -> None:
    # The sign of the second term is printed wrong in the RMiPO paper: a rejected response that gains must cost more.
    pairs = with_z(random_pairs(11, seed=3), 0.02)
    Kto()(pairs).losses.sum().backward()
    chosen, rejected = gradients(pairs)
    assert (chosen < 0).all()
    assert (rejected > 0).all()


def test_z_is_the_clamped_mean_of_all_mismatched_responses() -> None:
    objective = Kto(KtoConfig(beta=0.5))
    policy, reference = torch.tensor([[-3.0, -9.0], [-4.0, -2.0]]), torch.tensor([[-4.0, -5.0], [-9.0, -3.0]])
    # Log-ratios 1, -4, 5, 1: mean 0.75. Clamped one by one the mean would be 1.75.
    z = objective.prepare(batch_of(None, policy, reference), {})["z"]
    assert (z.item(), z.dtype, z.shape) == (0.375, torch.float64, ())
    # Mean -0.75: the bound is 0.
    assert objective.prepare(batch_of(None, reference, policy), {})["z"].item() == 0.0


def test_z_skips_the_responses_a_row_does_not_have() -> None:
    policy, reference = (
        torch.tensor([[-3.0, 0.0], [0.0, -2.0], [0.0, -1.0]]),
        torch.tensor([[-4.0, 0.0], [0.0, -7.0], [0.0, -1.5]]),
    )
    has_response = torch.tensor([[True, False], [False, True], [False, True]])
    z = Kto().prepare(BatchLogps(None, policy, reference, has_response), {})["z"]
    assert z.item() == pytest.approx(0.1 * 6.5 / 3.0)


def test_z_in_float64_from_sums_of_thousands() -> None:
    generator = torch.Generator().manual_seed(5)
    reference = -5000.0 * torch.rand(97, 2, generator=generator)
    policy = reference + torch.rand(97, 2, generator=generator)
    z = Kto().prepare(batch_of(None, policy, reference), {})["z"].item()
    exact = math.fsum((policy.double() - reference.double()).flatten().tolist()) / 194.0
    assert z == pytest.approx(0.1 * exact, rel=1e-13)


def float64_losses(pairs: PairLogps, config: KtoConfig, z: float) -> list[list[float]]:
    """Per row, the losses of the responses it has."""
    columns = [pairs.chosen_logps, pairs.rejected_logps, pairs.ref_chosen_logps, pairs.ref_rejected_logps]
    columns += [pairs.chosen_lengths, pairs.rejected_lengths]
    rows = zip(*(column.double().tolist() for column in columns if column is not None), strict=True)
    losses = []
    for lw, ll, rw, rl, nw, nl in rows:
        row = [config.desirable_weight * (1.0 - sigmoid(config.beta * (lw - rw) - z))] if nw else []
        row += [config.undesirable_weight * (1.0 - sigmoid(z - config.beta * (ll - rl)))] if nl else []
        losses.append(row)
    return losses


def test_losses_and_gradients_agree_with_float64() -> None:
    config = KtoConfig(beta=0.7, desirable_weight=1.3, undesirable_weight=0.6)
    pairs = with_z(random_pairs(29, seed=7), 0.31)
    output = Kto(config)(pairs)
    rows = float64_losses(pairs, config, 0.31)
    expected = torch.tensor([sum(row) / 2.0 for row in rows]).double()
    torch.testing.assert_close(output.losses.double(), expected, rtol=1e-5, atol=1e-7)
    output.losses.sum().backward()
    chosen, rejected = gradients(pairs)
    # d/dx (1 - sigmoid(x)) = -s (1 - s), and each of the two counts half.
    slopes = [[(loss / w) * (1.0 - loss / w) * w * 0.35 for loss, w in zip(row, (1.3, 0.6), strict=True)] for row in rows]
    torch.testing.assert_close(chosen, torch.tensor([-slope[0] for slope in slopes]).double(), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(rejected, torch.tensor([slope[1] for slope in slopes]).double(), rtol=1e-5, atol=1e-8)


def test_mean_over_rows_is_mean_over_responses() -> None:
    config = KtoConfig(desirable_weight=2.0)
    paired = with_z(random_pairs(9, seed=1), 0.1)
    unpaired = with_z(make_pairs(**UNPAIRED, ref=UNPAIRED_REF), 0.1)
    for pairs in (paired, unpaired):
        losses = [loss for row in float64_losses(pairs, config, 0.1) for loss in row]
        assert Kto(config)(pairs).losses.mean().item() == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_rows_with_one_response() -> None:
    pairs = with_z(make_pairs(**UNPAIRED, ref=UNPAIRED_REF), 0.05)
    output = Kto()(pairs)
    # 1 - sig(0.2 - 0.05), 1 - sig(0.05 + 0.1)
    assert output.losses.tolist() == pytest.approx([0.4625702, 0.4625702], abs=1e-6)
    metrics = {name: values.tolist() for name, values in output.metrics.items()}
    assert metrics["rewards/chosen"] == pytest.approx([0.2, math.nan], nan_ok=True)
    assert metrics["rewards/rejected"] == pytest.approx([math.nan, -0.1], nan_ok=True)
    assert metrics["kto/z"] == pytest.approx([0.05, 0.05])
    assert output.metrics["rewards/margins"].isnan().all()
    assert output.metrics["rewards/accuracies"].isnan().all()
    output.losses.sum().backward()
    chosen, rejected = gradients(pairs)
    slope = 0.1 * 0.4625702 * (1.0 - 0.4625702)
    assert chosen.tolist() == pytest.approx([-slope, 0.0], rel=1e-5)
    assert rejected.tolist() == pytest.approx([0.0, slope], rel=1e-5)


def test_a_batch_cut_anywhere_gives_the_same_losses() -> None:
    pairs = with_z(random_pairs(11, seed=8), 0.2)
    whole = Kto()(pairs)
    parts = [Kto()(part) for part in cut(pairs, 3, 4, 10)]
    assert torch.equal(torch.cat([part.losses for part in parts]), whole.losses)
    for name, values in whole.metrics.items():
        assert torch.equal(torch.cat([part.metrics[name] for part in parts]), values)


def test_policy_equal_to_the_reference() -> None:
    pairs = make_pairs([-5.0, -7.0], [-6.0, -7.0], ([2, 1], [3, 1]), ref=([-5.0, -7.0], [-6.0, -7.0]))
    sums = torch.tensor([[-4.0, -8.0], [-3.0, -2.0]])
    z = Kto().prepare(batch_of(None, sums, sums), {})["z"]
    assert z.item() == 0.0
    output = Kto()(dataclasses.replace(pairs, batch={"z": z}))
    assert output.losses.tolist() == [0.5, 0.5]
    assert output.metrics["rewards/accuracies"].tolist() == [0.0, 0.0]


def test_a_batch_of_one() -> None:
    pairs = make_pairs([-5.0], [-6.0], ([2], [3]), ref=([-5.5], [-5.0]))
    prepared = Kto().prepare(batch_of(None, torch.tensor([[-4.0, -3.0]]), torch.tensor([[-5.0, -3.0]])), {})
    output = Kto()(dataclasses.replace(pairs, batch=prepared))
    expected = (1.0 - sigmoid(0.05 - 0.05) + 1.0 - sigmoid(0.05 + 0.1)) / 2.0
    assert output.losses.item() == pytest.approx(expected, rel=1e-6)


def test_far_from_the_reference_losses_keep_their_digits() -> None:
    # Rewards of 500 and -500: losses of 0 and 1 with a finite gradient. At a reward of 20, 1 - sigmoid(20) = 2.0612e-9.
    sums, ref = ([-1.0, -5000.0, -4800.0], [-5000.0, -1.0, -5200.0]), ([-5000.0, -1.0, -5000.0], [-1.0, -5000.0, -5000.0])
    pairs = with_z(make_pairs(*sums, ([1, 2000, 1999], [2000, 1, 2000]), ref=ref), 0.0)
    output = Kto()(pairs)
    assert output.losses.tolist() == pytest.approx([0.0, 1.0, 2.0611537e-9], rel=1e-5, abs=1e-30)
    output.losses.sum().backward()
    assert all(gradient.isfinite().all() for gradient in gradients(pairs))
    assert all(values.isfinite().all() for values in output.metrics.values())


def test_needs_and_no_state() -> None:
    objective = Kto()
    assert objective.needs == LogpNeeds(reference=True, mismatched=True, unpaired=True)
    assert objective.initial_state() == {}
    output = objective(with_z(random_pairs(3, seed=1), 0.1))
    assert output.losses.requires_grad
    assert not any(values.requires_grad for values in output.metrics.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.0}, ["beta", "greater than 0"]),
        ({"desirable_weight": -1.0}, ["desirable_weight", "at least 0"]),
        ({"undesirable_weight": math.inf}, ["undesirable_weight", "inf"]),
        ({"desirable_weight": 0.0, "undesirable_weight": 0}, ["desirable_weight 0", "set one above 0"]),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        KtoConfig(**options)
    assert all(word in str(error.value) for word in words), error.value
