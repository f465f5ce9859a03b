"""Logits that are compared with transformers' are those that log-probs are made of."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from megatron_rmipo.checkpoint.verify import policy_logits
from megatron_rmipo.model.build import build_policy
from megatron_rmipo.model.megatron_config import transformer_config
from megatron_rmipo.model.packed_model import head_weight
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime
from tests.harness import run_distributed
from tests.model.test_build import ARCH

MULTIPLIER, CAP = 30.0, 2.5


def logits_of_a_model_that_caps_them() -> dict[str, Tensor]:
    groups = initialize_runtime()
    arch = dataclasses.replace(ARCH, logit_multiplier=MULTIPLIER, logit_softcap=CAP)
    policy = build_policy(arch, transformer_config(arch, groups), groups, chunk_size=7)
    ids, positions = (torch.arange(12) * 5) % 53, torch.arange(12)
    segments = torch.tensor([[0, 12, 0, 0]])
    with torch.no_grad():
        logits = policy_logits(policy, ids, groups)
        logprobs = policy(ids, positions, segments, positions[:-1], ids[1:])
        product = policy(ids, positions, segments, positions, None) @ head_weight(policy)[:53].t()
    shutdown_runtime()
    assert logits is not None
    return {"logits": logits, "logprobs": logprobs, "product": product}


@pytest.mark.dist
def test_logits_are_scaled_and_capped_in_both() -> None:
    (found,) = run_distributed(logits_of_a_model_that_caps_them, 1)
    expected = CAP * (found["product"] * MULTIPLIER / CAP).tanh()
    # Far from what they would be without, on either side of the cap's bend.
    assert (found["product"] * MULTIPLIER - expected).abs().max() > 0.5
    torch.testing.assert_close(found["logits"], expected)
    targets = (torch.arange(1, 12) * 5) % 53
    logprobs = expected[:-1].log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(found["logprobs"], logprobs)
