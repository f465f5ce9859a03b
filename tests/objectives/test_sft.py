"""Supervised fine-tuning: the token mean of the global batch, and nothing read of the rejected responses."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_rmipo.objectives.sft import Sft
from tests.objectives.pairs import make_pairs


def test_mean_over_pairs_is_mean_over_tokens() -> None:
    output = Sft()(make_pairs([-6.0, -1.0], [0.0, 0.0], ([3, 1], [1, 1])))
    assert output.losses.mean().item() == pytest.approx(7.0 / 4.0)  # 7 nats over 4 tokens, not the mean of 2 and 1
    assert output.losses.tolist() == pytest.approx([3.0, 0.5])


def test_gradient_is_the_same_for_every_token() -> None:
    pairs = make_pairs([-6.0, -1.0], [0.0, 0.0], ([3, 1], [1, 1]))
    Sft()(pairs).losses.mean().backward()
    assert pairs.chosen_logps.grad is not None
    assert pairs.chosen_logps.grad.tolist() == pytest.approx([-0.25, -0.25])
    assert pairs.rejected_logps.grad is None


def test_rejected_responses_are_neither_needed_nor_read() -> None:
    assert Sft().needs.rejected is False
    pairs = make_pairs([-6.0], [-9.0], ([3], [2]))
    poisoned = dataclasses.replace(pairs, rejected_logps=torch.tensor([float("nan")]), rejected_lengths=torch.tensor([0.0]))
    output = Sft()(poisoned)
    assert torch.isfinite(output.losses).all()
    assert all(torch.isfinite(metric).all() for metric in output.metrics.values())
