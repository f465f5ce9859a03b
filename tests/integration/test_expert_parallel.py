"""Mixtures of experts at every layout: loss and gradients against transformers in float64, weights after two steps."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rmipo.config.schema import Config, ExpertsConfig, OptimizerConfig
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.model.build import build_model
from megatron_rmipo.model.policy import PolicyModel
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.passes.expert_load import take_expert_load
from megatron_rmipo.passes.step_passes import gradient_pass, prepare_batch
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime
from megatron_rmipo.training.setup import TrainingState, build_training_state
from megatron_rmipo.training.step import train_step
from tests.harness import run_distributed
from tests.integration.problem import DenseProblem, collection, make_pairs
from tests.integration.sparse import architecture, load, make_model, own_tensors
from tests.integration.worlds import Case, build_batches, end_case

WORLDS = {
    1: [
        Case("one rank", model="mixtral", tokens_per_microbatch=120),
        Case("full recomputation", model="mixtral", recompute="full", tokens_per_microbatch=120),
        Case("shared experts", model="shared", tokens_per_microbatch=120),
    ],
    2: [
        # Ranks have packs of other lengths, and at 61 tokens of other numbers.
        Case("EP 2", model="mixtral", ep=2, tokens_per_microbatch=120),
        Case("EP 2, one pair a pack", model="mixtral", ep=2, tokens_per_microbatch=48),
        Case("EP 2, shared experts", model="shared", ep=2, tokens_per_microbatch=120),
        Case("PP 2, shared experts", model="shared", pp=2, tokens_per_microbatch=120),
        Case("TP 2", model="mixtral", tp=2, sequence_parallel=True, tokens_per_microbatch=120),
        Case("TP 2, EP 2 in its place", model="shared", tp=2, ep=2, etp=1, sequence_parallel=True, tokens_per_microbatch=120),
    ],
    4: [
        Case("EP 2 x DP 2", model="mixtral", ep=2, tokens_per_microbatch=120, overlap=True),
        Case("EP 2 x PP 2", model="mixtral", ep=2, pp=2, tokens_per_microbatch=120),
        Case("EP 2 x PP 2, shared experts", model="shared", ep=2, pp=2, tokens_per_microbatch=120),
        Case("EP 2 x TP 2", model="mixtral", ep=2, tp=2, sequence_parallel=True, tokens_per_microbatch=120),
        Case("EP 2 x TP 2, shared experts", model="shared", ep=2, tp=2, sequence_parallel=True, tokens_per_microbatch=120),
    ],
}


def state_of(case: Case, folder: str, groups: ProcessGroups, config: Config | None = None) -> TrainingState:
    """The policy with a kind's weights, wrapped for training."""
    config = config or case.config()
    policy = build_model(architecture(case.model), config, groups)
    load(policy, AutoModelForCausalLM.from_pretrained(f"{folder}/{case.model}", dtype=torch.float32).state_dict(), groups)
    return build_training_state(policy, config, groups, train_iters=10)


def loss_and_errors(
    case: Case, folder: str, pairs: PairCollection, gradients: dict[str, Tensor], groups: ProcessGroups
) -> dict[str, Any]:
    """The loss of the global batch, and how far each gradient of this rank is from the right one."""
    state, objective = state_of(case, folder, groups), build_objective(case.objective, case.options)
    batch = build_batches(case, pairs, state.policy, groups).build(np.arange(len(pairs)))
    state.model.zero_grad_buffer()
    state.model.eval()
    prepared = prepare_batch(state.model, batch, objective, objective.initial_state(), groups)
    state.model.train()
    metrics = gradient_pass(state.model, batch, objective, prepared, groups)
    expected, errors = own_tensors(gradients, state.policy, groups), {}
    # Expert biases have no gradient.
    for name, parameter in state.policy.named_parameters():
        found: Tensor = parameter.main_grad  # type: ignore[attr-defined]
        errors[name] = float((found.double() - expected[name]).norm() / expected[name].norm().clamp(min=1e-12))
    rows = {"packs": len(batch.conditional), "tokens": [row.num_tokens for row in batch.conditional]}
    return {"loss": metrics.values["loss"].double().mean().item(), "errors": errors, **rows}


def run_cases(cases: list[Case], folder: str, pairs: PairCollection, gradients: dict[str, dict[str, Tensor]]) -> list[Any]:
    """Each case's :func:`loss_and_errors` on this rank."""
    results: list[Any] = [None] * len(cases)
    layout_of = lambda number: cases[number].layout()  # noqa: E731
    for layout, numbers in itertools.groupby(sorted(range(len(cases)), key=lambda n: str(layout_of(n))), key=layout_of):
        groups = initialize_runtime(**layout)  # type: ignore[arg-type]
        for number in numbers:
            case = cases[number]
            results[number] = loss_and_errors(case, folder, pairs, gradients[case.model], groups)
        end_case()
    return results


@pytest.mark.dist
@pytest.mark.parametrize("world_size", sorted(WORLDS))
def test_loss_and_gradients_are_transformers_own_however_experts_are_spread(world_size: int, tmp_path: Path) -> None:
    cases, pairs = WORLDS[world_size], make_pairs()
    answers: dict[str, Any] = {}
    gradients: dict[str, dict[str, Tensor]] = {}
    for kind in {case.model: None for case in cases}:
        make_model(tmp_path / kind, kind)
        problem = DenseProblem(tmp_path / kind, tmp_path / kind, pairs)
        answers[kind] = problem.answer(build_objective("rmipo", {}))
        # By the names of transformers' parameters, which have a layer's experts in one, and not by those of stored tensors.
        gradients[kind] = {name: p.grad for name, p in problem.model.named_parameters() if p.grad is not None}
    ranks = run_distributed(run_cases, world_size, cases, str(tmp_path), collection(pairs), gradients)
    for number, case in enumerate(cases):
        results = [rank[number] for rank in ranks]
        for result in results:
            assert result["loss"] == pytest.approx(answers[case.model][0], rel=1e-5), case.name
            worst = max(result["errors"], key=result["errors"].get)
            assert result["errors"][worst] < 1e-4, (case.name, worst, result["errors"][worst])
        if case.ep > case.tp:
            assert len({result["packs"] for result in results}) == 1
            assert len({str(result["tokens"]) for result in results}) > 1, "rows of ranks differ in length"


TRAINED = [
    Case("one rank", model="mixtral", tokens_per_microbatch=200),
    Case("EP 2 x DP 2", model="mixtral", ep=2, tokens_per_microbatch=60, distributed_optimizer=True, overlap=True),
    Case("EP 2 x PP 2", model="mixtral", ep=2, pp=2, tokens_per_microbatch=120),
    Case("EP 2 x TP 2", model="mixtral", ep=2, tp=2, sequence_parallel=True, tokens_per_microbatch=120),
]


def _by_number_in_the_model(policy: PolicyModel, groups: ProcessGroups) -> dict[str, Tensor]:
    """This rank's weights, layers and experts numbered over all ranks."""
    first_layer = policy.config.num_layers // groups.pp_size * groups.pp_rank
    first_expert = 6 // groups.ep.size() * groups.ep.rank()
    weights = {}
    for name, parameter in policy.named_parameters():
        name = re.sub(r"(?<=decoder\.layers\.)\d+", lambda found: str(int(found[0]) + first_layer), name)
        name = re.sub(r"(?<=local_experts\.)\d+", lambda found: str(int(found[0]) + first_expert), name)
        weights[name] = parameter.detach().clone()
    return weights


def train_cases(cases: list[Case], folder: str, pairs: PairCollection) -> list[Any]:
    """By case, what two steps with auxiliary losses change of this rank's weights, the gradient's norm, and experts' load."""
    results = []
    for case in cases:
        groups = initialize_runtime(**case.layout())  # type: ignore[arg-type]
        # What Adam does with so large an eps is about proportional to the gradients.
        optimizer = OptimizerConfig(lr=10.0, adam_eps=1.0, clip_grad=1.0, lr_decay_style="constant")
        experts = ExpertsConfig(moe_aux_loss_coeff=0.5, moe_z_loss_coeff=0.05)
        config = dataclasses.replace(case.config(), optimizer=optimizer, experts=experts)
        state, objective = state_of(case, folder, groups, config), build_objective("rmipo", {})
        before = _by_number_in_the_model(state.policy, groups)
        batch = build_batches(case, pairs, state.policy, groups).build(np.arange(len(pairs)))
        norms = [train_step(state, batch, objective, groups).grad_norm for _ in range(2)]
        state.gather_parameters()
        after = _by_number_in_the_model(state.policy, groups)
        changes = {name: weight - before[name] for name, weight in after.items()}
        results.append({"changes": changes, "norms": norms, "load": take_expert_load(state.policy, groups, each=True)})
        end_case()
    return results


@pytest.mark.dist
def test_two_steps_with_auxiliary_losses_lead_to_the_same_weights(tmp_path: Path) -> None:
    make_model(tmp_path / "mixtral", "mixtral")
    pairs = collection(make_pairs())
    expected = run_distributed(train_cases, 1, TRAINED[:1], str(tmp_path), pairs)[0][0]
    ranks = run_distributed(train_cases, 4, TRAINED[1:], str(tmp_path), pairs)
    for number, case in enumerate(TRAINED[1:]):
        for result in (rank[number] for rank in ranks):
            assert result["norms"] == pytest.approx(expected["norms"], rel=1e-4), case.name
            assert result["load"] == pytest.approx(expected["load"], rel=1e-4), case.name
            for name, change in result["changes"].items():
                whole = expected["changes"][name]
                if whole.shape == change.shape:
                    assert (change - whole).norm() < 1e-3 * whole.norm(), (case.name, name)
