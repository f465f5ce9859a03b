"""Somebody else's GPTModel in a bare loop of Megatron's schedules gives the dense answer, however the batch is cut."""

from __future__ import annotations

import dataclasses
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
LAYOUTS = {
    1: [ForeignCase("TP 1"), ForeignCase("prompts not shared", share_prompts=False), ForeignCase("padded", padded=True)],
    2: [
        ForeignCase("TP 2, sequence parallel", tp=2, sequence_parallel=True),
        ForeignCase("PP 2", pp=2),
        ForeignCase("DP 2"),
        ForeignCase("padded, TP 2, sequence parallel", padded=True, tp=2, sequence_parallel=True),
        ForeignCase("padded, PP 2", padded=True, pp=2),
        ForeignCase("padded, PP 2, one shape", padded=True, pp=2, pad_to=35),
        ForeignCase("padded, DP 2, one shape", padded=True, pad_to=35),
    ],
}


def check_all(cases: list[ForeignCase], world_size: int, folder: Path, *, layers: int = 4) -> None:
    """Compare each case with the dense answer."""
    pairs = make_pairs()
    model, reference = (make_hf_model(folder / f"llama/{name}", seed=seed, layers=layers) for seed, name in enumerate(MODELS))
    problem = DenseProblem(model, reference, pairs)
    answers = {case.objective: problem.answer(build_objective(case.objective, case.options)) for case in cases}
    if "beta_dpo" in answers:
        # It draws pairs by their places in the global batch.
        order = PairOrder(len(pairs), seed=1234).epoch(0)
        shuffled = DenseProblem(model, reference, [pairs[number] for number in order])
        loss, gradients, metrics = shuffled.answer(build_objective("beta_dpo", {}))
        answers["beta_dpo"] = loss, gradients, {name: values[order.argsort()] for name, values in metrics.items()}
    results = run_distributed(run_foreign, world_size, cases, str(folder), collection(pairs))[0]
    for case, result in zip(cases, results, strict=True):
        check(case, result, answers[case.objective])


@pytest.mark.dist
@pytest.mark.parametrize("world_size", sorted(LAYOUTS))
def test_same_loss_and_gradients_in_a_foreign_loop(world_size: int, tmp_path: Path) -> None:
    cases = [
        dataclasses.replace(case, objective=name, before_step=before_step)
        for name in ("rmipo", "simpo", "dpo", "kto")
        for case in LAYOUTS[world_size]
        for before_step in ((False, True) if name in ("rmipo", "kto") else (False,))
        if before_step or case.pp == 1 or name != "kto"
    ]
    check_all(cases, world_size, tmp_path)


def ways_of(line: str) -> tuple[str, list[bool]]:
    """Of a line of the page's table: the objective, and whether it runs without a hook at PP 1, at PP 2, and with one at PP 2."""
    name, *cells = (cell.strip() for cell in line.strip().strip("|").split("|"))
    return name.strip("`"), [cell == "yes" for cell in cells[:3]]


PAGE = Path(__file__).parent.parent.parent / "docs/plugin/batches.md"
TABLE = PAGE.read_text(encoding="utf-8").partition("## Objectives")[2]
WAYS = dict(ways_of(line) for line in TABLE.splitlines() if line.startswith("| `"))


@pytest.mark.dist
@pytest.mark.parametrize("pp", [1, 2])
def test_every_objective_as_the_page_has_it(pp: int, tmp_path: Path) -> None:
    assert list(WAYS) == list(OBJECTIVES)
    cases = [
        # Where nothing is asked for before the schedule, the hook does what the step's first forward does.
        ForeignCase(name, objective=name, options=OPTIONS.get(name, {}), pp=pp, num_microbatches=3, before_step=needs_hook)
        for name, (_, alone_at_two, _) in WAYS.items()
        for needs_hook in (pp == 2 and not alone_at_two,)
    ]
    check_all(cases, pp, tmp_path, layers=2)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_needs_a_hook_at_two_stages_is_refused_by_name(name: str) -> None:
    groups: Any = types.SimpleNamespace(
        dp_rank=0, dp_size=1, pp_size=2, is_last_stage=False, ep=types.SimpleNamespace(size=lambda: 1)
    )
    pairs, objective = collection(make_pairs()), build_objective(name, OPTIONS.get(name, {}))
    pairs.reference_scores = [np.zeros((len(pairs), 2), dtype=np.float32)]
    batches = preference_batches(pairs, objective, global_batch_size=6, num_microbatches=2, context_token_id=BOS, groups=groups)
    model = torch.nn.Identity()
    model.config = types.SimpleNamespace(  # type: ignore[assignment]
        calculate_per_token_loss=True, context_parallel_size=1, sequence_parallel=False, finalize_model_grads_func=print
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
