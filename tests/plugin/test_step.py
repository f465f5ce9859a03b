"""What PreferenceStep refuses, and what it carries from step to step."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.plugin.batches import PreferenceBatches, preference_batches
from megatron_rmipo.plugin.step import PreferenceStep
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime
from tests.harness import run_distributed
from tests.integration.problem import BOS, collection, make_hf_model, make_pairs
from tests.integration.worlds import Case
from tests.plugin.foreign import Foreign, build_foreign, run_schedule

NUM_MICROBATCHES = 3


class SecondStage:
    """Groups of a rank alone, that says it is one of two stages."""

    pp_size = 2

    def __init__(self, groups: ProcessGroups) -> None:
        self.groups = groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self.groups, name)


def make_batches(name: str, groups: ProcessGroups, *, steps: int = 2, unconditional: Any = "rows") -> PreferenceBatches:
    pairs = collection(make_pairs(14))
    pairs.reference_scores = [np.random.default_rng(3).normal(-20, 4, (14, 2)).astype(np.float32)]
    return preference_batches(
        pairs,
        build_objective(name, {}),
        global_batch_size=7,
        num_microbatches=NUM_MICROBATCHES,
        total_pairs=7 * steps,
        context_token_id=BOS,
        unconditional=unconditional,
        groups=groups,
    )


def refused(name: str, attempt: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        attempt()
    return f"{name}: {caught.value}"


def misuse(hf_dir: str) -> list[str]:
    """What each misuse is told."""
    groups = initialize_runtime()
    foreign = build_foreign(Case("alone"), Path(hf_dir), groups)
    config, messages = foreign.model.module.config, []

    def run(name: str, where: Any = groups, **how: Any) -> Any:
        step = PreferenceStep(build_objective(name, {}), groups=where)
        run_schedule(foreign, step, make_batches(name, groups, **how), num_microbatches=NUM_MICROBATCHES)
        return step

    stages: Any = SecondStage(groups)
    for name in ("kto", "beta_dpo", "epsilon_dpo"):
        messages.append(refused(name, lambda name=name: run(name, stages)))
    messages.append(refused("pass", lambda: run("rmipo", stages, unconditional="pass")))
    run("rmipo", stages)
    twice = run("simpo")
    twice.after_step()
    messages.append(refused("twice", twice.after_step))
    config.calculate_per_token_loss = False
    messages.append(refused("mean of means", lambda: run("simpo")))
    config.calculate_per_token_loss = True
    config.finalize_model_grads_func = None
    messages.append(refused("sum", lambda: run("simpo")))
    shutdown_runtime()
    return messages


@pytest.mark.dist
def test_misuse_is_told_by_name(tmp_path: Path) -> None:
    messages = run_distributed(misuse, 1, str(make_hf_model(tmp_path / "hf", layers=1)))[0]
    expected = [
        ("kto", "log-probs of mismatched pairs, .*step.before_step"),
        ("beta_dpo", "log-probs of the whole batch, what it carries from step to step, .*step.before_step"),
        ("epsilon_dpo", "a reference in memory, .*step.before_step"),
        ("pass", r"log p\(y\) from a pass of its own, .*step.before_step"),
        ("twice", "none was run"),
        ("mean of means", "calculate_per_token_loss"),
        ("sum", "finalize_model_grads_func"),
    ]
    for message, (name, pattern) in zip(messages, expected, strict=True):
        assert message.startswith(f"{name}: ")
        assert re.search(pattern, message), message


def states(hf_dir: str) -> dict[str, Any]:
    """beta_dpo's state over steps in loops that do different things."""
    groups = initialize_runtime()
    foreign = build_foreign(Case("alone"), Path(hf_dir), groups)
    found: dict[str, Any] = {}

    def steps(name: str, each: Callable[[PreferenceStep, Foreign], Any]) -> None:
        step = PreferenceStep(build_objective("beta_dpo", {}), groups=groups)
        batches = make_batches("beta_dpo", groups, steps=4)
        seen = [dict(step.state)]
        for _ in range(3):
            run_schedule(foreign, step, batches, num_microbatches=NUM_MICROBATCHES)
            each(step, foreign)
            seen.append(dict(step.state))
        step.before_step(foreign.model, batches.peek())
        found[name] = [*seen, dict(step.state)]

    def evaluate(step: PreferenceStep, foreign: Foreign) -> None:
        step.after_step()
        foreign.model.eval()
        with torch.no_grad():
            batches = make_batches("beta_dpo", groups, steps=1)
            run_schedule(foreign, step, batches, num_microbatches=NUM_MICROBATCHES, forward_only=True)
        foreign.model.train()
        step.after_step()

    steps("after each", lambda step, foreign: step.after_step())
    steps("never after", lambda step, foreign: None)
    steps("no update", lambda step, foreign: step.after_step(updated=False))
    steps("evaluation between", evaluate)
    shutdown_runtime()
    return found


@pytest.mark.dist
def test_state_follows_updates_alone(tmp_path: Path) -> None:
    found = run_distributed(states, 1, str(make_hf_model(tmp_path / "hf", layers=1)))[0]
    first, *later = found["after each"]
    assert first not in later
    assert later[0] != later[1] != later[2] == later[3]
    assert found["never after"] == [first, first, *later[:2], later[2]]
    assert found["no update"] == [first] * 5
    assert found["evaluation between"] == found["after each"]
