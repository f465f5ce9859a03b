"""The RMiPO authors' trainer, followed over twelve optimizer steps at several layouts, and our token ids against theirs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tests.parity.replay import Layout, beyond_bounds, compare, replay, token_mismatches

FIXTURES = Path(__file__).parent / "fixtures"
LAYOUTS = [Layout(), Layout(tp=2), Layout(pp=2), Layout(dp=2), Layout(tp=2, pp=2)]


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"tp{layout.tp}-pp{layout.pp}-dp{layout.dp}")
def test_rmipo_follows_the_authors_trainer(layout: Layout) -> None:
    errors, weights = replay(FIXTURES / "rmipo", layout)
    assert len(errors) == 12
    assert beyond_bounds(errors, weights) == []


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=lambda layout: f"tp{layout.tp}-pp{layout.pp}-dp{layout.dp}")
def test_simpo_follows_the_authors_trainer(layout: Layout) -> None:
    errors, weights = replay(FIXTURES / "simpo", layout)
    assert len(errors) == 12
    assert beyond_bounds(errors, weights) == []


@pytest.mark.parametrize("objective", ["rmipo", "simpo"])
def test_our_data_tool_makes_their_token_ids(objective: str) -> None:
    assert token_mismatches(FIXTURES / objective) == []


def recorded() -> tuple[dict[str, Any], dict[str, Any]]:
    """Their record, and one of ours that agrees with it to the digit."""
    expected = json.loads((FIXTURES / "rmipo" / "expected.json").read_text())
    names = {"losses": "loss", "margins": "rewards/margins", "gamma": "gamma", "delta_pmi": "dpmi"}
    steps = [
        {"grad_norm": step["grad_norm"], **{ours: list(step[theirs]) for theirs, ours in names.items()}}
        for step in expected["steps"]
    ]
    return expected, {"steps": steps}


def test_a_deviation_is_noticed() -> None:
    expected, ours = recorded()
    assert beyond_bounds(compare(expected, ours), 0.0) == []
    for name in ("loss", "rewards/margins", "gamma", "dpmi"):
        wrong = copy.deepcopy(ours)
        wrong["steps"][4][name][1] += 0.01
        problems = beyond_bounds(compare(expected, wrong), 0.0)
        assert len(problems) == 1, (name, problems)
        assert problems[0].startswith("step 5")
    assert len(beyond_bounds(compare(expected, ours), 2e-4)) == 1
