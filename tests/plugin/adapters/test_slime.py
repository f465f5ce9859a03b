"""slime's custom loss, with batches and the vocabulary's shards as it hands them over."""

from __future__ import annotations

import itertools
import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.objectives.registry import OBJECTIVES, build_objective
from megatron_rmipo.plugin.adapters.slime import ObjectiveLoss, samples_of_pair, samples_per_pair
from tests.harness import run_distributed
from tests.integration.problem import BOS, VOCAB, make_pairs
from tests.plugin.adapters.conftest import Problem, check_gradients

REFUSED = {"kto", "alpha_dpo", "beta_dpo", "epsilon_dpo", "amapo", "gamma_po", "bco_pair", "aot_pair", "sft", "cpo", "orpo"}
# One for each kind of what objectives read, and forms of them; the losses of others are made of the same.
CASES = [
    *((name, {}) for name in ("simpo", "rmipo", "dpo")),
    ("cpo", {"sft_weight": 0.0}),
    ("rmipo:0.7,dpo:0.5", {}),
]
ARGS = types.SimpleNamespace(calculate_per_token_loss=False, context_parallel_size=1, rollout_temperature=1.0, rollout_top_p=1.0)


def nothing(_: Tensor) -> Tensor:
    raise AssertionError


def micro_batch(objective: Objective, numbers: Sequence[int], removed: int | None = None) -> dict[str, Any]:
    """Samples of some pairs, those of one taken out as slime's ``remove_sample`` does it."""
    samples, masks = [], []
    for number in numbers:
        own = samples_of_pair(make_pairs()[number], objective, context_token_id=BOS)
        samples += own
        masks += [[0] * one.response_length if number == removed else one.loss_mask for one in own]
    return {
        "unconcat_tokens": [torch.tensor(one.tokens) for one in samples],
        "total_lengths": [len(one.tokens) for one in samples],
        "response_lengths": [one.response_length for one in samples],
        "loss_masks": [torch.tensor(mask, dtype=torch.int) for mask in masks],
    }


def logits_of(model: Any, batch: dict[str, Any]) -> Tensor:
    """``[1, T, V]`` of samples one after the other, and padding behind them."""
    rows = [model(tokens[None]).logits[0] for tokens in batch["unconcat_tokens"]]
    return torch.cat([*rows, torch.zeros(5, rows[0].shape[1])])[None]


def reference_of(model: Any, batch: dict[str, Any]) -> list[Tensor]:
    """What slime keeps of its reference: log-probs of each sample's response."""
    found = []
    with torch.no_grad():
        for tokens, size in zip(batch["unconcat_tokens"], batch["response_lengths"], strict=True):
            logprobs = torch.log_softmax(model(tokens[None]).logits[0, :-1], -1).gather(1, tokens[1:, None])[:, 0]
            found.append(logprobs[len(logprobs) - size :])
    return found


@pytest.mark.parametrize(("name", "options"), CASES, ids=[name for name, _ in CASES])
def test_every_kind_of_objective_it_can_train_is_as_in_float64(name: str, options: dict[str, Any], problem: Problem) -> None:
    objective = build_objective(name, options)
    model, reference = problem.models()
    loss_fn = ObjectiveLoss(objective, tensor_parallel_group=lambda: None)
    metrics: dict[str, float] = {}
    for start, end in itertools.pairwise([0, 5, 6, 17, 24]):
        batch = micro_batch(objective, range(start, end))
        if objective.needs.reference:
            batch["ref_log_probs"] = reference_of(reference, batch)
        loss, found = loss_fn(ARGS, batch, logits_of(model, batch), nothing)
        (loss / 24).backward()
        metrics = {key: metrics.get(key, 0.0) + float(value) / 24 for key, value in found.items()}
    expected, gradients, means = problem.answer(objective)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert set(metrics) == {"loss", *means} - {"nll/chosen"}
    for key in set(metrics) - {"loss"}:
        assert metrics[key] == pytest.approx(float(means[key].double().mean()), rel=1e-4, abs=1e-5), key
    check_gradients(model, gradients)


def one_of_two() -> tuple[list[float], Tensor, Tensor]:
    """Losses from whole logits and from shards of two ranks, padded to 86 columns, and the gradients of both."""
    dist.init_process_group("gloo")
    objective = build_objective("rmipo", {})
    batch = micro_batch(objective, range(7))
    logits = torch.randn(1, sum(batch["total_lengths"]), 86, generator=torch.Generator().manual_seed(0))
    whole, shard = logits[..., :VOCAB].clone().requires_grad_(), logits.chunk(2, dim=-1)[dist.get_rank()].clone().requires_grad_()
    losses = []
    for given, group in ((whole, None), (shard, dist.group.WORLD)):
        loss_fn = ObjectiveLoss(objective, tensor_parallel_group=lambda group=group: group, vocab_size=VOCAB)
        loss, _ = loss_fn(ARGS, batch, given, nothing)
        loss.backward()
        losses.append(loss.item())
    assert torch.equal(shard, logits.chunk(2, dim=-1)[dist.get_rank()])
    dist.destroy_process_group()
    assert whole.grad is not None
    assert shard.grad is not None
    return losses, whole.grad, shard.grad


@pytest.mark.dist
def test_a_vocabulary_over_two_ranks() -> None:
    ranks = run_distributed(one_of_two, 2)
    for losses, _, _ in ranks:
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    whole, shards = torch.nn.functional.pad(ranks[0][1], (0, 86 - VOCAB)), torch.cat([ranks[0][2], ranks[1][2]], dim=-1)
    torch.testing.assert_close(shards, whole, rtol=1e-5, atol=1e-7)


def test_pairs_that_were_removed_do_not_count(problem: Problem) -> None:
    objective = build_objective("simpo", {})
    model, _ = problem.models()
    loss_fn = ObjectiveLoss(objective, tensor_parallel_group=lambda: None)
    losses = []
    for numbers in ([0, 1, 2], [0, 2], [1]):
        batch = micro_batch(objective, numbers, removed=1)
        loss, _ = loss_fn(ARGS, batch, logits_of(model, batch), nothing)
        losses.append(loss)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    assert losses[2].item() == 0
    losses[2].backward()
    assert model.lm_head.weight.grad.abs().max() == 0


def test_responses_alone_without_a_context() -> None:
    objective, pair = build_objective("rmipo", {}), make_pairs()[0]
    samples = samples_of_pair(pair, objective, context_token_id=None)
    assert samples_per_pair(objective) == len(samples) == 4
    assert samples[2].tokens == pair.chosen.tolist()
    assert samples[2].loss_mask == [1] * (pair.chosen.size - 1)
    with pytest.raises(DataError, match="a response of one token, alone"):
        samples_of_pair(make_pairs()[3], objective, context_token_id=None)
    assert len(samples_of_pair(pair, build_objective("dpo", {}), context_token_id=None)) == 2


def test_what_cannot_be_is_refused_by_name(problem: Problem) -> None:
    def loss_of(name: str) -> ObjectiveLoss:
        return ObjectiveLoss(build_objective(name, {}), tensor_parallel_group=lambda: None)

    for name in REFUSED:
        with pytest.raises(ConfigError, match=f"objective {name} in slime: it"):
            loss_of(name)
    for name in OBJECTIVES.keys() - REFUSED:
        loss_of(name)
    objective, (model, _) = build_objective("rmipo", {}), problem.models()
    batch = micro_batch(objective, range(3))
    logits = logits_of(model, batch)
    for flag, value in (("calculate_per_token_loss", True), ("context_parallel_size", 2), ("rollout_temperature", 0.7)):
        with pytest.raises(ConfigError, match=f"--{flag.replace('_', '-')} {value}: objective rmipo"):
            loss_of("rmipo")(types.SimpleNamespace(**{**vars(ARGS), flag: value}), batch, logits, nothing)
    with pytest.raises(ConfigError, match=r"objective dpo needs log-probs under a reference.*--ref-load and --use-kl-loss"):
        loss_of("dpo")(ARGS, micro_batch(build_objective("dpo", {}), range(3)), logits, nothing)
    with pytest.raises(DataError, match=r"a micro-batch of 11 samples; each pair is 4 samples.*--micro-batch-size"):
        loss_of("rmipo")(ARGS, {key: values[:11] for key, values in batch.items()}, logits, nothing)
    with pytest.raises(DataError, match="samples 0 to 3 of a micro-batch are not those of one pair"):
        loss_of("rmipo")(ARGS, {key: values[2:10] for key, values in batch.items()}, logits, nothing)
