"""The loss function's interface of NeMo-RL, with stand-ins for its enums, its batches and its policy."""

from __future__ import annotations

import enum
import sys
import types
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_rmipo.data.store.pair_store import TokenizedPair
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.registry import OBJECTIVES, build_objective
from megatron_rmipo.plugin.adapters.nemo_rl import ObjectiveBatches, ObjectiveLoss, refuse_objective
from tests.integration.problem import BOS, make_pairs, values_beside
from tests.plugin.adapters.conftest import Problem, check_gradients
from tests.plugin.adapters.padded import preference_batch

LossType = enum.Enum("LossType", "TOKEN_LEVEL SEQUENCE_LEVEL")
LossInputType = enum.Enum("LossInputType", "LOGIT LOGPROB")
# What NeMo-RL cannot give, and forms of them that it can.
REFUSED = {"epsilon_dpo", "beta_dpo", "bco_pair", "rmipo:0.7,kto:2,beta_dpo:0.5"}
# One for each kind of what objectives read, and forms of them; the losses of others are made of the same.
CASES = [
    *((name, {}) for name in ("simpo", "rmipo", "dpo", "cpo", "sft", "alpha_dpo", "amapo", "aot_pair", "kto")),
    ("rmipo", {"sft_weight": 0.3}),
    ("dpo", {"pair_margin": True, "pair_beta": True}),
    ("rmipo:0.7,kto:2,amapo:0.5", {}),
]


@pytest.fixture(autouse=True)
def _interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    interfaces: Any = types.ModuleType("nemo_rl.algorithms.loss.interfaces")
    interfaces.LossType, interfaces.LossInputType = LossType, LossInputType
    monkeypatch.setitem(sys.modules, interfaces.__name__, interfaces)


class Policy:
    """What a driver asks of NeMo-RL's policy: the log-prob of each token at its place, 0 for the first."""

    sharding_annotations = None

    def __init__(self, model: Any, reference: Any) -> None:
        self.model, self.reference = model, reference
        self.asked: list[str] = []

    def get_logprobs(self, data: Any) -> dict[str, Tensor]:
        self.asked.append("policy")
        return {"logprobs": self._logprobs(self.model, data)}

    def get_reference_policy_logprobs(self, data: Any, micro_batch_size: int | None = None) -> dict[str, Tensor]:
        self.asked.append("reference")
        return {"reference_logprobs": self._logprobs(self.reference, data)}

    def _logprobs(self, model: Any, data: Any) -> Tensor:
        assert data["input_lengths"].tolist() == [max(int((row != 0).sum()), 1) for row in data["input_ids"]]
        assert data["input_ids"].shape[1] % 3 == 0
        with torch.no_grad():
            return torch.nn.functional.pad(next_token_logprobs(model, data["input_ids"]), (1, 0))


def next_token_logprobs(model: Any, ids: Tensor) -> Tensor:
    logprobs: Tensor = torch.log_softmax(model(ids).logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    return logprobs


def add_reference(dataloader: Any, policy: Any, master_config: Any, is_val: bool = False) -> Iterator[Any]:
    for batch in dataloader:
        logprobs = policy.get_reference_policy_logprobs(batch, micro_batch_size=4)["reference_logprobs"]
        batch["reference_policy_logprobs"] = torch.roll(logprobs, -1, dims=-1)
        yield batch


def global_batch() -> UserDict[str, Tensor]:
    """The pairs, and among them one that is too long, of which nothing is left to score."""
    cut = TokenizedPair(np.array([BOS, 5]), np.array([7]), np.array([8]))
    pairs = [*make_pairs()[:9], cut, *make_pairs()[9:]]
    rows = preference_batch(pairs, "interleaved")
    valid = torch.ones(len(pairs))
    valid[9] = 0
    rows["completion_mask"][18:20] = 0
    beside = np.insert(values_beside(24), 9, 0, axis=0)
    return UserDict(
        {
            "input_ids": rows["input_ids"],
            "input_lengths": rows["attention_mask"].sum(1),
            "token_mask": rows["completion_mask"],
            "sample_mask": valid.repeat_interleave(2),
            "beta": torch.from_numpy(beside[:, 0]).repeat_interleave(2),
            "margin": torch.from_numpy(beside[:, 1]).repeat_interleave(2),
        }
    )


def config_of(**policy: Any) -> Any:
    return types.SimpleNamespace(policy={"logprob_batch_size": 4, "make_sequence_length_divisible_by": 3, **policy})


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{name}-{len(options)}" for name, options in CASES])
def test_every_kind_of_objective_it_can_train_is_as_in_float64(name: str, options: dict[str, Any], problem: Problem) -> None:
    objective = build_objective(name, options)
    policy = Policy(*problem.models())
    (batch,) = ObjectiveBatches(objective, add_reference, context_token_id=BOS)([global_batch()], policy, config_of())
    needs = objective.needs
    assert policy.asked.count("reference") == needs.reference + needs.mismatched
    loss_fn = ObjectiveLoss(objective)
    assert (loss_fn.loss_type, loss_fn.input_type) == (LossType.SEQUENCE_LEVEL, LossInputType.LOGPROB)
    metrics: dict[str, float] = {}
    # Micro-batches of 4 pairs; in the third all but one, in the last the only one is left.
    for start in range(0, 50, 8):
        rows = {key: values[start : start + 8] for key, values in batch.items()}
        loss, found = loss_fn(
            next_token_logprobs=next_token_logprobs(policy.model, rows["input_ids"]),
            data=rows,
            global_valid_seqs=torch.tensor(48.0),
            global_valid_toks=None,
        )
        loss.backward()
        metrics = {key: metrics.get(key, 0.0) + value for key, value in found.items()}
    expected, gradients, means = problem.answer(objective)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["num_valid_samples"] == 24
    for key, values in means.items():
        assert metrics[key] == pytest.approx(float(values.double().mean()), rel=1e-4, abs=1e-5), key
    check_gradients(policy.model, gradients)


def test_a_micro_batch_of_which_nothing_counts(problem: Problem) -> None:
    objective = build_objective("rmipo", {})
    policy = Policy(*problem.models())
    (batch,) = ObjectiveBatches(objective, add_reference, context_token_id=None)([global_batch()], policy, config_of())
    rows = {key: values[18:20] for key, values in batch.items()}
    logprobs = next_token_logprobs(policy.model, rows["input_ids"])
    loss, metrics = ObjectiveLoss(objective)(logprobs, rows, torch.tensor(48), None)
    loss.backward()
    assert loss == 0
    assert all(parameter.grad.abs().max() == 0 for parameter in policy.model.parameters())
    assert metrics["num_valid_samples"] == metrics["rewards/margins"] == 0


def test_what_cannot_be_is_refused_by_name(problem: Problem) -> None:
    for name in REFUSED:
        with pytest.raises(ConfigError, match=f"objective {name} in NeMo-RL: it"):
            refuse_objective(build_objective(name, {}))
        with pytest.raises(ConfigError, match=f"objective {name} in NeMo-RL: it"):
            ObjectiveLoss(build_objective(name, {}))
    for name in OBJECTIVES.keys() - REFUSED:
        refuse_objective(build_objective(name, {}))
    objective, policy = build_objective("rmipo", {}), Policy(*problem.models())
    batches = ObjectiveBatches(objective, add_reference, context_token_id=BOS)
    with pytest.raises(ConfigError, match=r"policy.logprob_batch_size is not set: objective rmipo"):
        next(batches([global_batch()], policy, config_of(logprob_batch_size=None)))
    batch = global_batch()
    logprobs = next_token_logprobs(policy.model, batch["input_ids"])
    with pytest.raises(ConfigError, match=r"objective rmipo: the batch has no 'unconditional_logps'.*add_ref_logprobs_to_data"):
        ObjectiveLoss(objective)(logprobs, batch, torch.tensor(48), None)
    with pytest.raises(ConfigError, match="a batch of 1 rows"):
        ObjectiveLoss(objective)(logprobs[:1], {key: values[:1] for key, values in batch.items()}, torch.tensor(48), None)
