"""What no family's experts have at every layout: a dense layer, shared experts, sigmoid scores with biases, groups of experts.

Loss and gradients against transformers in float64, weights after two steps with auxiliary losses. Families are compared in
tests/families/test_every_family.py, objectives over a mixture of experts in test_invariance.py.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from megatron_rmipo.config.schema import Config, ExpertsConfig, OptimizerConfig
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.model.build import build_model
from megatron_rmipo.model.policy import PolicyModel
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.passes.expert_load import take_expert_load
from megatron_rmipo.passes.step_passes import gradient_pass, prepare_batch
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.training.setup import TrainingState, build_training_state
from megatron_rmipo.training.step import train_step
from tests.harness import run_distributed
from tests.integration.problem import DenseProblem, collection, make_pairs
from tests.integration.sparse import KINDS, architecture, load, make_model, own_tensors
from tests.integration.worlds import Case, build_batches, run_at_layouts

# Those that are trained besides; ranks have packs of other lengths, and at 60 tokens of other numbers.
WORLDS = {
    1: [Case("trained", tokens_per_microbatch=200)],
    2: [
        Case("EP 2", ep=2, tokens_per_microbatch=120),
        Case("trained: CP 2, EP 2", cp=2, ep=2, tokens_per_microbatch=120, distributed_optimizer=True),
        Case("PP 2", pp=2, tokens_per_microbatch=120),
        Case("TP 2, EP 2 in its place", tp=2, ep=2, etp=1, sequence_parallel=True, tokens_per_microbatch=120),
    ],
    4: [
        Case("trained: EP 2 x DP 2", ep=2, tokens_per_microbatch=60, distributed_optimizer=True, overlap=True),
        Case("trained: EP 2 x PP 2", ep=2, pp=2, tokens_per_microbatch=120),
        Case("trained: EP 2 x TP 2", ep=2, tp=2, sequence_parallel=True, tokens_per_microbatch=120),
    ],
}


def state_of(config: Config, folder: str, groups: ProcessGroups) -> TrainingState:
    """The policy with the model's weights, wrapped for training."""
    policy = build_model(architecture("shared"), config, groups)
    load(policy[0], Path(folder), groups)
    return build_training_state(policy, config, groups, train_iters=10)


def compute(
    case: Case, folder: str, pairs: PairCollection, groups: ProcessGroups, *, gradients: dict[str, Tensor]
) -> dict[str, Any]:
    """The loss of the global batch, how far each gradient of this rank is from the right one, and what training leads to."""
    # The distributed optimizer leaves each rank with its share of gradients.
    config = dataclasses.replace(case, distributed_optimizer=False).config()
    state, objective = state_of(config, folder, groups), build_objective(case.objective, case.options)
    batch = build_batches(case, pairs, state.policy, groups).build(np.arange(len(pairs)))
    state.model.zero_grad_buffer()
    state.model.eval()
    prepared = prepare_batch(state.model, batch, objective, objective.initial_state(), groups)
    state.model.train()
    metrics = gradient_pass(state.model, batch, objective, prepared, groups)
    expected, errors = own_tensors(gradients, state.policy[0], groups), {}
    # Expert biases have no gradient.
    for name, parameter in state.policy[0].named_parameters():
        found: Tensor = parameter.main_grad  # type: ignore[attr-defined]
        errors[name] = float((found.double() - expected[name]).norm() / expected[name].norm().clamp(min=1e-12))
    rows = {"packs": len(batch.conditional), "tokens": [row.num_tokens for row in batch.conditional]}
    trained = train(case, folder, pairs, groups) if "trained" in case.name else {}
    return {"loss": metrics.values["loss"].double().mean().item(), "errors": errors, **rows, **trained}


def train(case: Case, folder: str, pairs: PairCollection, groups: ProcessGroups) -> dict[str, Any]:
    """What two steps with auxiliary losses change of this rank's weights, the gradient's norm, and experts' load."""
    # What Adam does with so large an eps is about proportional to the gradients.
    optimizer = OptimizerConfig(lr=10.0, adam_eps=1.0, clip_grad=1.0, lr_decay_style="constant")
    experts = ExpertsConfig(moe_aux_loss_coeff=0.5, moe_z_loss_coeff=0.05)
    config = dataclasses.replace(case.config(), optimizer=optimizer, experts=experts)
    state, objective = state_of(config, folder, groups), build_objective(case.objective, case.options)
    before = _by_number_in_the_model(state.policy[0], groups)
    batch = build_batches(case, pairs, state.policy, groups).build(np.arange(len(pairs)))
    norms = [train_step(state, batch, objective, groups).grad_norm for _ in range(2)]
    state.gather_parameters()
    changes = {name: weight - before[name] for name, weight in _by_number_in_the_model(state.policy[0], groups).items()}
    return {"changes": changes, "norms": norms, "load": take_expert_load(state.policy, groups, each=True)}


def _by_number_in_the_model(policy: PolicyModel, groups: ProcessGroups) -> dict[str, Tensor]:
    """This rank's weights, layers and experts numbered over all ranks."""
    first_layer = policy.config.num_layers // groups.pp_size * groups.pp_rank
    first_expert = KINDS["shared"][0].num_experts // groups.ep.size() * groups.ep.rank()
    weights = {}
    for name, parameter in policy.named_parameters():
        name = re.sub(r"(?<=decoder\.layers\.)\d+", lambda found: str(int(found[0]) + first_layer), name)
        name = re.sub(r"(?<=local_experts\.)\d+", lambda found: str(int(found[0]) + first_expert), name)
        weights[name] = parameter.detach().clone()
    return weights


def check_training(name: str, result: dict[str, Any], alone: dict[str, Any]) -> None:
    """A rank's training is that of one rank alone, as far as it holds the same weights."""
    assert result["norms"] == pytest.approx(alone["norms"], rel=1e-4), name
    assert result["load"] == pytest.approx(alone["load"], rel=1e-4), name
    for weight, change in result["changes"].items():
        whole = alone["changes"][weight]
        if whole.shape == change.shape:
            assert (change - whole).norm() < 1e-3 * whole.norm(), (name, weight)


@pytest.mark.dist
def test_gradients_and_two_steps_are_the_same_however_experts_are_spread(tmp_path: Path) -> None:
    make_model(tmp_path)
    pairs = make_pairs()
    loss, gradients, _ = DenseProblem(tmp_path, tmp_path, pairs).answer(build_objective("rmipo", {}))
    run = functools.partial(run_at_layouts, functools.partial(compute, gradients=gradients))
    alone: dict[str, Any] = {}
    for world_size, cases in WORLDS.items():
        ranks = run_distributed(run, world_size, cases, str(tmp_path), collection(pairs))
        for case, results in zip(cases, zip(*ranks, strict=True), strict=True):
            for result in results:
                assert result["loss"] == pytest.approx(loss, rel=1e-5), case.name
                worst = max(result["errors"], key=result["errors"].get)
                assert result["errors"][worst] < 1e-4, (case.name, worst, result["errors"][worst])
                if "trained" in case.name:
                    alone = alone or result
                    check_training(case.name, result, alone)
            if case.ep > case.tp * case.cp:
                assert len({result["packs"] for result in results}) == 1
                assert len({str(result["tokens"]) for result in results}) > 1, "rows of ranks differ in length"
