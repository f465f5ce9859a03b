"""Every objective over a plain model of transformers, in uneven micro-batches, against one sequence at a time in float64."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.objectives.pair_weight import PairWeighted
from megatron_rmipo.objectives.registry import OBJECTIVES, build_objective
from megatron_rmipo.plugin.adapters.causal_lm import CausalLmLoss
from tests.harness import run_distributed
from tests.integration.problem import BOS, PairList, make_pairs, values_beside
from tests.integration.test_objectives import FORMS, OPTIONS
from tests.plugin.adapters.conftest import Problem, check_gradients, load_model
from tests.plugin.adapters.padded import preference_batch

# By what they want to know of a batch: nothing, its order, its statistics, its number of tokens.
TWO_PROCESSES = ("rmipo", "kto", "beta_dpo", "gamma_po", "sft")
CUTS = [0, 5, 6, 17, 24]  # pairs of micro-batches: 5, 1, 11, 7
CASES = [*((name, OPTIONS.get(name, {})) for name in OBJECTIVES), *FORMS.items(), ("rmipo", {"sft_weight": 0.3})]


def micro_batches(cuts: list[int]) -> list[dict[str, Any]]:
    pairs, beside = make_pairs(), torch.from_numpy(values_beside(24))
    return [
        {
            **preference_batch(pairs[start:end]),
            "columns": dict(zip(PairList.manifest.pair_columns, beside[start:end].T, strict=True)),
        }
        for start, end in itertools.pairwise(cuts)
    ]


def step(model: Any, loss: CausalLmLoss, objective: Objective, batches: list[dict[str, Any]]) -> float:
    """Backward over the micro-batches as Trainer does it; the loss of the step."""
    total = 0.0
    for batch, facts in zip(batches, loss.before_step(model, batches, objective.initial_state()), strict=True):
        mean = (loss(model, batch, facts).losses.sum() * facts.weight) / len(batches)
        mean.backward()
        total += mean.item()
    return total


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{name}-{len(options)}" for name, options in CASES])
def test_every_objective_is_as_in_float64(name: str, options: dict[str, Any], problem: Problem) -> None:
    check(build_objective(name, options), problem)


def test_weights_of_pairs_count(problem: Problem) -> None:
    check(PairWeighted(build_objective("dpo", {})), problem)


def check(objective: Objective, problem: Problem) -> None:
    model, reference = problem.models()
    model.train()
    # A part that its owner keeps as it is.
    model.model.embed_tokens.eval()
    loss = CausalLmLoss(objective, context_token_id=BOS, reference=reference)
    value = step(model, loss, objective, micro_batches(CUTS))
    expected, gradients, _ = problem.answer(objective)
    assert value == pytest.approx(expected, rel=1e-5)
    check_gradients(model, gradients)
    assert (model.training, model.lm_head.training, model.model.embed_tokens.training) == (True, True, False)
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_sums_of_the_reference_may_come_with_the_batch(problem: Problem) -> None:
    model, reference = problem.models()
    batches = micro_batches([0, 3, 8])
    objective = build_objective("beta_dpo", {})
    expected = step(model, CausalLmLoss(objective, context_token_id=BOS, reference=reference), objective, batches)
    kept = CausalLmLoss(objective, context_token_id=BOS, reference=reference)
    for batch in batches:
        sums = kept._reference_sums(batch)
        batch.update(ref_chosen_logps=sums[:, 0], ref_rejected_logps=sums[:, 1])
    assert step(model, CausalLmLoss(objective, context_token_id=BOS), objective, batches) == expected


# By objective: (rows, whether in training mode) of each forward pass of the policy, and rows of each of the reference.
PASSES = {
    "simpo": ([(16, True)], []),
    "sft": ([(8, True)], []),
    "rmipo": ([(16, False), (16, True)], []),
    "dpo": ([(16, True)], [16]),
    "beta_dpo": ([(16, False), (16, True)], [16]),
    "kto": ([(16, False), (16, True)], [16, 16]),
    "epsilon_dpo": ([(16, True)], [16]),
}


@pytest.mark.parametrize("name", PASSES)
def test_nothing_is_computed_that_nobody_asked_for(name: str, problem: Problem) -> None:
    model, reference = problem.models()
    model.train()
    of_policy: list[tuple[int, bool]] = []
    of_reference: list[int] = []
    note = lambda module, _, given: of_policy.append((len(given["input_ids"]), module.training))  # noqa: E731
    model.register_forward_pre_hook(note, with_kwargs=True)
    reference.register_forward_pre_hook(lambda _, __, given: of_reference.append(len(given["input_ids"])), with_kwargs=True)
    objective = build_objective(name, {})
    step(model, CausalLmLoss(objective, context_token_id=BOS, reference=reference), objective, micro_batches([0, 8]))
    assert (of_policy, of_reference) == PASSES[name]


def test_without_a_context_token_the_first_is_not_scored(problem: Problem) -> None:
    model, _ = problem.models()
    (batch,) = micro_batches([0, 8])
    rows = CausalLmLoss(build_objective("rmipo", {}), context_token_id=None)._responses(batch)
    assert rows.scored.sum(1).tolist() == (batch["completion_mask"].sum(1) - 1).tolist()
    assert rows.token_ids[0, 0] == make_pairs()[0].chosen[0]
    with torch.no_grad():
        logprobs = torch.log_softmax(model(rows.token_ids).logits[0, :-1], -1)
    chosen = torch.from_numpy(make_pairs()[0].chosen)
    expected = logprobs[: len(chosen) - 1].gather(1, chosen[1:, None]).sum()
    found = CausalLmLoss(build_objective("rmipo", {}), context_token_id=None)._scores(model, rows).logps[0, 0]
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_what_cannot_be_is_refused_by_name(problem: Problem) -> None:
    model, reference = problem.models()
    (batch,) = micro_batches([0, 3])
    columns = batch.pop("columns")

    def losses(name: str, options: dict[str, Any], batch: dict[str, Any], **given: Any) -> None:
        objective = build_objective(name, options)
        step(model, CausalLmLoss(objective, context_token_id=BOS, **given), objective, [batch])

    with pytest.raises(ConfigError, match=r"objective dpo needs log-probs under a reference, and there is no reference model"):
        losses("dpo", {}, batch)
    with pytest.raises(ConfigError, match="objective kto needs log-probs of responses to other prompts under the reference"):
        losses("kto", {}, batch)
    with pytest.raises(ConfigError, match="objective epsilon_dpo needs a reference whose logits are mixed"):
        losses("epsilon_dpo", {}, batch)
    with pytest.raises(ConfigError, match=r"objective dpo reads each pair's margin and batch\['columns'\] has weight"):
        losses("dpo", {"pair_margin": True}, {**batch, "columns": {"weight": columns["weight"]}}, reference=reference)
    with pytest.raises(ConfigError, match="a batch with 'pixel_values'"):
        losses("simpo", {}, {**batch, "pixel_values": torch.zeros(1)})
    with pytest.raises(DataError, match="the batch of a step: all 1 prompts are the same"):
        losses("kto", {}, preference_batch(make_pairs()[:1]), reference=reference)
    batch["completion_mask"][4] = 0
    with pytest.raises(DataError, match="no token of the rejected response of pair 1 of a batch is scored"):
        losses("simpo", {}, batch)


def one_of_two(hf_dir: str, reference_dir: str) -> dict[str, float]:
    dist.init_process_group("gloo")
    model, reference = load_model(Path(hf_dir)), load_model(Path(reference_dir))
    # As a data loader deals them out: the first micro-batch to one rank, the second to the other.
    batches = micro_batches(CUTS)[dist.get_rank() :: 2]
    values = {}
    for name in TWO_PROCESSES:
        objective = build_objective(name, {})
        loss = CausalLmLoss(objective, context_token_id=BOS, reference=reference, group=dist.group.WORLD)
        values[name] = step(model, loss, objective, batches)
    dist.destroy_process_group()
    return values


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_share_a_global_batch(problem: Problem) -> None:
    ranks = run_distributed(one_of_two, 2, str(problem.hf_dir), str(problem.reference_dir))
    for name in TWO_PROCESSES:
        expected, _, _ = problem.answer(build_objective(name, {}))
        assert (ranks[0][name] + ranks[1][name]) / 2 == pytest.approx(expected, rel=1e-5), name
