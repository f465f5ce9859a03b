"""Auxiliary losses of experts against their definition over the whole batch, what routers keep, and the figures of their load."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_rmipo.config.schema import Config, ExpertsConfig
from megatron_rmipo.data.batches.batch_builder import BatchBuilder, RankBatch
from megatron_rmipo.model.build import build_model
from megatron_rmipo.model.layers.experts import routers
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.passes.expert_load import take_expert_load
from megatron_rmipo.passes.layout import batch_layout
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime
from megatron_rmipo.training.setup import TrainingState, build_training_state
from megatron_rmipo.training.step import evaluate_batch, train_step
from tests.integration.problem import BOS, collection, make_pairs
from tests.integration.sparse import KINDS, architecture

OBJECTIVE = build_objective("rmipo", {})
PAIRS = collection(make_pairs())


@pytest.fixture
def groups() -> Iterator[ProcessGroups]:
    yield initialize_runtime()
    shutdown_runtime()


def config_of(*, bf16: bool = False, **flags: Any) -> Config:
    plain = Config()
    return dataclasses.replace(
        plain,
        experts=ExpertsConfig(**flags),
        model=dataclasses.replace(plain.model, make_vocab_size_divisible_by=8, bf16=bf16),
        optimizer=dataclasses.replace(plain.optimizer, lr=1e-3, clip_grad=0.0),
        data=dataclasses.replace(plain.data, tokens_per_microbatch=60),
    )


def state_of(kind: str, config: Config, groups: ProcessGroups) -> TrainingState:
    """A policy of random weights, the same each time, with score biases where it has them."""
    policy = build_model(architecture(kind), config, groups)
    generator = torch.Generator().manual_seed(3)
    for parameter in policy.parameters():
        if parameter.dim() > 1:
            parameter.data.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    for router in routers(policy):
        if router.expert_bias is not None:
            router.expert_bias.copy_(0.3 * torch.randn(router.num_experts, generator=generator))
    return build_training_state(policy, config, groups, train_iters=10)


def batch_of(config: Config, kind: str, *, multiple_of: int = 1, dp_size: int = 1) -> RankBatch:
    layout = batch_layout(config, architecture(kind), OBJECTIVE.needs, context_token_id=BOS, dp_rank=dp_size - 1, dp_size=dp_size)
    return BatchBuilder(PAIRS, dataclasses.replace(layout, multiple_of=multiple_of)).build(np.arange(len(PAIRS)))


def gradients_of(kind: str, groups: ProcessGroups, **flags: Any) -> tuple[dict[str, Tensor], TrainingState, RankBatch]:
    """Gradients of one step, from the weights before it."""
    config = config_of(**flags)
    # Padded rows: what stands for nothing must not count.
    state, batch = state_of(kind, config, groups), batch_of(config, kind, multiple_of=16)
    train_step(state, batch, OBJECTIVE, groups)
    return {name: p.main_grad.clone() for name, p in state.policy.named_parameters()}, state, batch  # type: ignore[attr-defined]


def auxiliary_gradients(kind: str, groups: ProcessGroups, aux: float, z: float) -> dict[str, Tensor]:
    """By definition: the logits of all tokens of the batch in one table, the two losses of each layer, and their gradients."""
    config = config_of()
    policy, batch = state_of(kind, config, groups).policy, batch_of(config, kind)
    experts, logits = KINDS[kind][0], dict[int, list[Tensor]]()
    own = list(routers(policy))
    hooks = []
    for number, router in enumerate(own):
        keep = lambda module, args, number=number: logits.setdefault(number, []).append(module.gating(args[0])[:, 0])  # noqa: E731
        hooks.append(router.register_forward_pre_hook(keep))
    for row in batch.conditional:
        policy[0](row.token_ids, row.position_ids, row.segments, row.source, row.target)
    total = torch.zeros((), dtype=torch.float64)
    for tables in logits.values():
        table = torch.cat(tables).double()
        scores = (
            table.softmax(1) if experts.score_function == "softmax" else table.sigmoid() / table.sigmoid().sum(1, keepdim=True)
        )
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(experts.per_token).indices, 1.0)
        shares = chosen.mean(0) / experts.per_token
        total = total + aux * experts.num_experts * (shares * scores.mean(0)).sum() + z * table.logsumexp(1).square().mean()
    total.backward()
    return {name: p.main_grad.clone() for name, p in policy.named_parameters()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS)
def test_auxiliary_losses_are_those_of_all_tokens_of_the_batch(kind: str, groups: ProcessGroups) -> None:
    plain, _, _ = gradients_of(kind, groups)
    found, _, batch = gradients_of(kind, groups, moe_aux_loss_coeff=0.7, moe_z_loss_coeff=0.2)
    assert len(batch.conditional) > 5
    expected = auxiliary_gradients(kind, groups, 0.7, 0.2)
    total = torch.cat([(found[name] - plain[name] - expected[name]).flatten() for name in plain])
    assert total.norm() < 1e-4 * torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    # Of their own order: the loss of pairs is not all there is.
    for name in plain:
        if name.endswith("router.weight"):
            assert expected[name].norm() > 0.01 * plain[name].norm()


def test_forward_only_passes_leave_routers_as_they_were(groups: ProcessGroups) -> None:
    config = config_of()
    state, batch = state_of("shared", config, groups), batch_of(config, "shared")
    before = {name: buffer.clone() for name, buffer in state.policy.named_buffers()}
    evaluate_batch(state, batch, OBJECTIVE, groups)
    assert take_expert_load(state.policy, groups) == {}
    after = dict(state.policy.named_buffers())
    assert any(name.endswith("local_tokens_per_expert") for name in after)
    assert all(torch.equal(before[name], buffer) for name, buffer in after.items())


@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_score_biases_are_frozen_unless_told_to_follow_the_load(rate: float, groups: ProcessGroups) -> None:
    config = config_of(moe_router_bias_update_rate=rate)
    state, batch = state_of("shared", config, groups), batch_of(config, "shared", multiple_of=16)
    before = [router.expert_bias.clone() for router in routers(state.policy)]  # type: ignore[union-attr]
    train_step(state, batch, OBJECTIVE, groups)
    choices = [router.tally.choices for router in routers(state.policy)]
    assert [float(counts.sum()) for counts in choices] == [4.0 * batch.num_gradient_tokens] * 3, "padding does not count"
    for router, old, counts in zip(routers(state.policy), before, choices, strict=True):
        moved = rate * torch.sign(counts.mean() - counts).float()
        torch.testing.assert_close(router.expert_bias, old + moved)
        assert (moved != 0).any() == (rate > 0)


def test_score_biases_stay_fp32_in_a_model_in_bf16(groups: ProcessGroups) -> None:
    exact = [router.expert_bias for router in routers(state_of("shared", config_of(), groups).policy)]
    rounded = [router.expert_bias for router in routers(state_of("shared", config_of(bf16=True), groups).policy)]
    assert all(torch.equal(one, other) for one, other in zip(exact, rounded, strict=True))  # type: ignore[arg-type]


def test_load_is_told_by_few_figures_or_by_all(groups: ProcessGroups) -> None:
    _, state, batch = gradients_of("mixtral", groups)
    choices = torch.stack([router.tally.choices for router in routers(state.policy)])
    figures = take_expert_load(state.policy, groups, each=True)
    shares = choices / (2 * batch.num_gradient_tokens)
    assert figures["experts/imbalance"] == pytest.approx(6 * float(shares.amax(1).mean()))
    assert figures["experts/imbalance_worst_layer"] == pytest.approx(6 * float(shares.max()))
    assert figures["experts/layer_3/share_5"] == pytest.approx(float(shares[3, 5]))
    assert figures["experts/load_balancing_loss"] >= 0.9
    assert sum("/share_" in name for name in figures) == 4 * 6
    assert take_expert_load(state.policy, groups) == {}, "told once"


def test_a_filler_counts_nowhere(groups: ProcessGroups) -> None:
    config = config_of(moe_aux_loss_coeff=0.7, moe_z_loss_coeff=0.2)
    state = state_of("mixtral", config, groups)
    # More ranks than pairs: the last one has none of its own.
    batch = batch_of(config, "mixtral", dp_size=len(PAIRS) + 1)
    train_step(state, batch, OBJECTIVE, groups)
    assert take_expert_load(state.policy, groups) == {}
    assert all(not p.main_grad.any() for p in state.policy.parameters())  # type: ignore[attr-defined]
