"""Losses, margins and metrics per pair, against what the authors' trainer computed from the same log-probabilities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rmipo.objectives.base import PairLogps
from megatron_rmipo.objectives.metrics import output_of
from megatron_rmipo.objectives.registry import build_objective

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"


def load(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    expected = json.loads((FIXTURES / name / "expected.json").read_text())
    pairs = [json.loads(line) for line in (FIXTURES / name / "pairs.jsonl").read_text().splitlines()]
    assert len(expected["steps"]) == 12
    return expected, pairs


def logps_of(step: dict[str, Any], pairs: list[dict[str, Any]]) -> PairLogps:
    """Sums from the token means the trainer logged."""
    lengths = {
        side: torch.tensor([float(len(pairs[number][side])) for number in step["pairs"]]) for side in ("chosen", "rejected")
    }
    means = {side: torch.tensor(step[f"{side}_logps"]) for side in ("chosen", "rejected")}
    uncond: dict[str, Any] = {}
    if "chosen_uncond_logps" in step:
        for side in ("chosen", "rejected"):
            uncond[f"uncond_{side}_lengths"] = lengths[side] - 1.0
            uncond[f"uncond_{side}_logps"] = torch.tensor(step[f"{side}_uncond_logps"]) * (lengths[side] - 1.0)
    return PairLogps(
        chosen_logps=means["chosen"] * lengths["chosen"],
        rejected_logps=means["rejected"] * lengths["rejected"],
        chosen_lengths=lengths["chosen"],
        rejected_lengths=lengths["rejected"],
        mean_chosen_length=lengths["chosen"].mean(),
        **uncond,
    )


def close(actual: torch.Tensor, expected: list[float], tolerance: float) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("number", range(12))
def test_rmipo_official_preset(number: int) -> None:
    expected, pairs = load("rmipo")
    options = {key: expected[key] for key in ("beta", "gamma_min", "gamma_max", "label_smoothing", "sft_weight")}
    step = expected["steps"][number]
    output = output_of(build_objective("rmipo", {"preset": "official", **options}), logps_of(step, pairs))
    close(output.losses, step["losses"], 2e-6)
    close(output.metrics["gamma"], step["gamma"], 2e-6)
    close(output.metrics["dpmi"], step["delta_pmi"], 2e-6)
    close(output.metrics["rewards/margins"], step["margins"], 4e-6)
    close(output.metrics["rewards/chosen"], step["chosen_rewards"], 2e-6)
    close(output.metrics["logps/rejected"], step["rejected_logps"], 2e-6)
    assert output.losses.mean().item() == pytest.approx(step["loss"], rel=2e-6)


@pytest.mark.parametrize("number", range(12))
def test_simpo(number: int) -> None:
    expected, pairs = load("simpo")
    options = {key: expected[key] for key in ("beta", "gamma_beta_ratio", "label_smoothing", "sft_weight")}
    step = expected["steps"][number]
    output = build_objective("simpo", options)(logps_of(step, pairs))
    close(output.losses, step["losses"], 2e-6)
    close(output.metrics["rewards/margins"], step["margins"], 4e-6)
    assert output.losses.mean().item() == pytest.approx(step["loss"], rel=2e-6)
