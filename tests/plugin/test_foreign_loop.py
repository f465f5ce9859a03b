"""Somebody else's GPTModel in a bare loop of Megatron's schedules gives the dense answer, however the batch is cut."""

from __future__ import annotations

import dataclasses
import re
import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rmipo.data.batches.order import PairOrder
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.registry import OBJECTIVES, build_objective
from megatron_rmipo.plugin.batches import preference_batches
from megatron_rmipo.plugin.step import PreferenceStep
from tests.harness import run_distributed
from tests.integration.problem import BOS, DenseProblem, collection, make_hf_model, make_pairs
from tests.integration.test_invariance import check
from tests.integration.test_objectives import OPTIONS
from tests.plugin.foreign import ForeignCase, run_foreign

MODELS = ("model", "reference")
# Each layout with the objectives that run at it; of all others the packed rows' TP 1 and PP 2 stand for the rest.
FOUR = ("rmipo", "simpo", "dpo", "kto")
BOTH = "rmipo:0.7,gamma_po:0.5"
LAYOUTS = {
    1: [
        (ForeignCase("TP 1"), FOUR),
        (ForeignCase("prompts not shared", share_prompts=False), ("rmipo",)),
        (ForeignCase("padded", padded=True), FOUR),
    ],
    2: [
        (ForeignCase("TP 2, sequence parallel", tp=2, sequence_parallel=True), FOUR),
        (ForeignCase("PP 2", pp=2), FOUR),
        (ForeignCase("DP 2"), FOUR),
        (ForeignCase("padded, TP 2, sequence parallel", padded=True, tp=2, sequence_parallel=True), FOUR),
        (ForeignCase("padded, PP 2", padded=True, pp=2), FOUR),
        (ForeignCase("padded, PP 2, one shape", padded=True, pp=2, pad_to=35), ("rmipo",)),
        (ForeignCase("padded, DP 2, one shape", padded=True, pad_to=35), FOUR),
    ],
}


def ways_of(line: str) -> tuple[str, list[bool]]:
    """Of a line of the page's table: the objective, and whether it runs without a hook at PP 1, at PP 2, and with one at PP 2."""
    name, *cells = (cell.strip() for cell in line.strip().strip("|").split("|"))
    return name.strip("`"), [cell == "yes" for cell in cells[:3]]


PAGE = Path(__file__).parent.parent.parent / "docs/plugin/batches.md"
TABLE = PAGE.read_text(encoding="utf-8").partition("## Objectives")[2]
WAYS = dict(ways_of(line) for line in TABLE.splitlines() if line.startswith("| `"))


def cases_of(world_size: int) -> list[ForeignCase]:
    """The four objectives at every layout, without a hook and with one where that does something else, and all others."""
    cases = []
    for case, names in LAYOUTS[world_size]:
        for name in names:
            alone = case.pp == 1 or WAYS[name][1]
            with_hook = not alone or (name in ("rmipo", "kto") and not case.padded)
            ways = [False] * alone + [True] * with_hook
            cases += [dataclasses.replace(case, objective=name, before_step=before_step) for before_step in ways]
    for name, (_, alone_at_two, _) in WAYS.items():
        if name not in FOUR:
            # Where nothing is asked for before the schedule, the hook does what the step's first forward does.
            needs_hook = world_size == 2 and not alone_at_two
            others = {"objective": name, "options": OPTIONS.get(name, {}), "pp": world_size, "before_step": needs_hook}
            cases.append(ForeignCase(name, num_microbatches=3, **others))
    # What is asked of the whole batch is not told by responses alone that stand in the same rows.
    both = {"objective": BOTH, "before_step": False}
    cases += [dataclasses.replace(case, **both) for case, _ in LAYOUTS[world_size] if case.pp == case.tp == 1]
    if world_size == 2:
        cases += [
            ForeignCase("DP 2, ranks have seeds of their own", seed_apart=1),
            ForeignCase("PP 2, stages have seeds of their own", pp=2, before_step=True, seed_apart=1),
            ForeignCase("PP 2, tied, more micro-batches than pairs", pp=2, model="tied", num_microbatches=30),
        ]
    return cases


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], Any]]:
    """Where models and references lie, and the answer for each model and objective."""
    folder, pairs = tmp_path_factory.mktemp("models"), make_pairs()
    model, reference = (make_hf_model(folder / f"llama/{name}", seed=seed, layers=2) for seed, name in enumerate(MODELS))
    problem = DenseProblem(model, reference, pairs)
    answers = {
        ("llama", name): problem.answer(build_objective(name, OPTIONS.get(name, {}))) for name in OBJECTIVES if name != "beta_dpo"
    }
    answers["llama", BOTH] = problem.answer(build_objective(BOTH, {}))
    # It draws pairs by their places in the global batch.
    order = PairOrder(len(pairs), seed=1234).epoch(0)
    shuffled = DenseProblem(model, reference, [pairs[number] for number in order])
    loss, gradients, metrics = shuffled.answer(build_objective("beta_dpo", {}))
    answers["llama", "beta_dpo"] = loss, gradients, {name: values[order.argsort()] for name, values in metrics.items()}
    tied = make_hf_model(folder / "tied/model", layers=2, tie_word_embeddings=True)
    answers["tied", "rmipo"] = DenseProblem(tied, tied, pairs).answer(build_objective("rmipo", {}))
    return folder, answers


@pytest.mark.dist
@pytest.mark.parametrize("world_size", sorted(LAYOUTS))
def test_same_loss_and_gradients_in_a_foreign_loop(world_size: int, dense: tuple[Path, Any]) -> None:
    assert list(WAYS) == list(OBJECTIVES)
    (folder, answers), cases = dense, cases_of(world_size)
    results = run_distributed(run_foreign, world_size, cases, str(folder), collection(make_pairs()))[0]
    for case, result in zip(cases, results, strict=True):
        if case.seed_apart:
            assert re.search("would not run the same: the pairs of the first batch is .* on rank 0, but .* on rank 1", result)
        else:
            check(case, result, answers[case.model, case.objective])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_needs_a_hook_at_two_stages_is_refused_by_name(name: str) -> None:
    groups: Any = types.SimpleNamespace(
        dp_rank=0, dp_size=1, pp_size=2, is_last_stage=False, ep=types.SimpleNamespace(size=lambda: 1), dp=None, tp=None
    )
    pairs, objective = collection(make_pairs()), build_objective(name, OPTIONS.get(name, {}))
    pairs.reference_scores = [np.zeros((len(pairs), 2), dtype=np.float32)]
    batches = preference_batches(pairs, objective, global_batch_size=6, num_microbatches=2, context_token_id=BOS, groups=groups)
    model = torch.nn.Identity()
    model.config = types.SimpleNamespace(  # type: ignore[assignment]
        calculate_per_token_loss=True, finalize_model_grads_func=print, sequence_parallel=False, context_parallel_size=1
    )
    reference = model if objective.needs.perturbation is not None else None
    run = partial(PreferenceStep(objective, reference=reference, groups=groups), batches, model)
    alone_at_one, alone_at_two, hook_at_two = WAYS[name]
    assert alone_at_one
    assert hook_at_two
    # The former is said of a model where nothing else is in the way.
    message = "takes no packed rows yet" if alone_at_two else f"objective {name} reads .*step.before_step"
    with pytest.raises(ConfigError, match=message):
        run()
