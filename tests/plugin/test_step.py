"""What PreferenceStep refuses, and what it carries from step to step."""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.passes.rows import check_lengths
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


def make_batches(
    name: str, groups: ProcessGroups, *, steps: int = 2, unconditional: Any = "rows", consumed_pairs: int = 0
) -> PreferenceBatches:
    pairs = collection(make_pairs(14))
    pairs.reference_scores = [np.random.default_rng(3).normal(-20, 4, (14, 2)).astype(np.float32)]
    return preference_batches(
        pairs,
        build_objective(name, {}),
        global_batch_size=7,
        num_microbatches=NUM_MICROBATCHES,
        total_pairs=7 * steps,
        consumed_pairs=consumed_pairs,
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

    def run(name: str, where: Any = groups, num_microbatches: int = NUM_MICROBATCHES, **how: Any) -> Any:
        reference = foreign.model if name == "epsilon_dpo" else None
        step = PreferenceStep(build_objective(name, {}), reference=reference, groups=where)
        run_schedule(foreign, step, make_batches(name, groups, **how), num_microbatches=num_microbatches)
        return step

    def run_chunks(step: PreferenceStep, iterators: tuple[PreferenceBatches, PreferenceBatches]) -> None:
        for number in range(2 * NUM_MICROBATCHES):
            step(iterators[number % 2], (foreign.model, foreign.model.module)[number % 2])
        step.after_step()

    stages: Any = SecondStage(groups)
    for name in ("kto", "beta_dpo", "epsilon_dpo"):
        messages.append(refused(name, lambda name=name: run(name, stages)))
    messages.append(refused("pass", lambda: run("rmipo", stages, unconditional="pass")))
    run("rmipo", stages)
    twice = run("simpo")
    twice.after_step()
    messages.append(refused("twice", twice.after_step))
    for number in (2, 4):
        messages.append(refused(f"{number} of 3", run("simpo", num_microbatches=number).after_step))
    messages.append(refused("over", lambda: run("simpo", steps=1, num_microbatches=4)))
    # Two chunks of a pipeline over an iterator for both of them, and over one for each that does not know the other.
    own = make_batches("simpo", groups)
    for iterators in ((own, own), (make_batches("simpo", groups), make_batches("simpo", groups))):
        step = PreferenceStep(build_objective("simpo", {}), groups=groups)
        messages.append(refused("chunks", functools.partial(run_chunks, step, iterators)))
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
        ("2 of 3", "the loop has run 2 of the 3 micro-batches .*num_microbatches"),
        ("4 of 3", "the loop has run 1 of the 3 micro-batches .*num_microbatches"),
        ("over", "the data is at its end.*total_pairs"),
        ("chunks", r"the loop has run \d of the 3 .*batches.chunks\(n\)"),
        ("chunks", r"the loop has run \d of the 3 .*batches.chunks\(n\)"),
        ("mean of means", "calculate_per_token_loss"),
        ("sum", "finalize_model_grads_func"),
    ]
    for message, (name, pattern) in zip(messages, expected, strict=True):
        assert message.startswith(f"{name}: ")
        assert re.search(pattern, message), message


def test_what_a_step_is_made_of_and_goes_on_from() -> None:
    groups: Any = types.SimpleNamespace()
    objective = build_objective("beta_dpo", {})
    with pytest.raises(ConfigError, match="objective 'beta_dpo': an Objective is expected"):
        PreferenceStep("beta_dpo", groups=groups)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"epsilon_dpo mixes logits .*PreferenceStep\(objective, reference=model\)"):
        PreferenceStep(build_objective("epsilon_dpo", {}), groups=groups)
    with pytest.raises(ConfigError, match=r"beta_dpo keeps no reference in memory.*leave reference out"):
        PreferenceStep(objective, reference=torch.nn.Identity(), groups=groups)
    step = PreferenceStep(objective, groups=groups)
    kept = step.state_dict()
    assert kept == {"objective": "beta_dpo", "state": objective.initial_state()}
    changed = {name: number + 0.25 for name, number in step.state.items()}
    step.load_state_dict(kept | {"state": changed})
    assert step.state_dict()["state"] == step.state == changed
    assert kept["state"] == objective.initial_state()
    for wrong in (
        {},
        kept | {"objective": "dpo"},
        kept | {"state": {}},
        kept["state"],
        kept | {"state": changed | {"more": 1.0}},
    ):
        with pytest.raises(ConfigError, match="is no state of objective beta_dpo, which carries "):
            step.load_state_dict(wrong)
    with pytest.raises(ConfigError, match="as nan; a finite number"):
        step.load_state_dict(kept | {"state": dict.fromkeys(changed, float("nan"))})
    assert step.state == changed
    without = PreferenceStep(build_objective("simpo", {}), groups=groups)
    without.load_state_dict(without.state_dict())
    with pytest.raises(ConfigError, match="which carries nothing"):
        without.load_state_dict(kept)


@pytest.mark.parametrize(
    ("settings", "backward", "message"),
    [
        ({"variable_seq_lengths": False}, False, "rows of 5 to 7 tokens .*variable_seq_lengths=False. Set it to True"),
        ({"virtual_pipeline_model_parallel_size": 2}, True, "5 to 7 .*interleaved over two ranks.*pad_to"),
        ({"virtual_pipeline_model_parallel_size": 2}, False, None),
        ({"virtual_pipeline_model_parallel_size": 2, "pipeline_model_parallel_size": 4}, True, None),
        ({"pipeline_model_parallel_size": 1, "variable_seq_lengths": False}, True, None),
        ({}, True, None),
    ],
)
def test_lengths_that_a_pipeline_would_mix_up_are_refused(settings: dict[str, Any], backward: bool, message: str | None) -> None:
    model: Any = torch.nn.Identity()
    config = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": None, "variable_seq_lengths": True}
    model.config = types.SimpleNamespace(**config | settings)
    rows: Any = [types.SimpleNamespace(token_ids=torch.zeros(length)) for length in (5, 7, 5)]
    check_lengths([model, model], rows[:1] + rows[2:], messages_of_megatron=backward)
    if message is None:
        check_lengths(model, rows, messages_of_megatron=backward)
    else:
        with pytest.raises(ConfigError, match=message):
            check_lengths(model, rows, messages_of_megatron=backward)


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

    def go_on() -> None:
        """Two steps, then a third by objects that were made anew."""
        step, batches = PreferenceStep(build_objective("beta_dpo", {}), groups=groups), make_batches("beta_dpo", groups, steps=4)
        for _ in range(2):
            run_schedule(foreign, step, batches, num_microbatches=NUM_MICROBATCHES)
            step.after_step()
        saved = {"step": step.state_dict(), "consumed_pairs": batches.consumed_pairs}
        step = PreferenceStep(build_objective("beta_dpo", {}), groups=groups)
        step.load_state_dict(saved["step"])
        batches = make_batches("beta_dpo", groups, steps=4, consumed_pairs=saved["consumed_pairs"])
        run_schedule(foreign, step, batches, num_microbatches=NUM_MICROBATCHES)
        step.after_step()
        found["gone on"] = dict(step.state)

    go_on()
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
    assert found["gone on"] == found["after each"][-1]
    assert found["never after"] == [first, first, *later[:2], later[2]]
    assert found["no update"] == [first] * 5
    assert found["evaluation between"] == found["after each"]
