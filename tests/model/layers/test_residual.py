"""How tokens enter the residual stream and what is added to it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rmipo.model.layers.residual import ResidualSum
from tests.harness import run_distributed
from tests.model.layers.test_norms import ARCH, EPS, dense


def _sum(multiplier: float, post_norm: bool) -> ResidualSum:
    from types import SimpleNamespace

    config: Any = SimpleNamespace(
        **{"use_cpu_initialization": True, "params_dtype": torch.float64, "sequence_parallel": True, "hidden_dropout": 0.0},
        **{"layernorm_zero_centered_gamma": False, "hidden_size": 7, "layernorm_epsilon": EPS},
    )
    return ResidualSum(config, dataclasses.replace(ARCH, post_norm=post_norm, residual_multiplier=multiplier))


def _tensors(requires_grad: bool = False) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(3)
    shapes = ((5, 1, 7), (7,), (5, 1, 7))
    return tuple(torch.randn(*shape, generator=random, dtype=torch.float64).requires_grad_(requires_grad) for shape in shapes)


@pytest.mark.parametrize("post_norm", [True, False])
def test_what_is_added_has_its_bias_is_normed_and_multiplied(post_norm: bool) -> None:
    add = _sum(0.25, post_norm)
    output, bias, residual = _tensors()
    added = output + bias
    if post_norm:
        weight = add.post_layernorm.weight
        assert weight.sequence_parallel
        weight.data.copy_(torch.arange(1.0, 8.0))
        added = dense(added, weight.detach())
    torch.testing.assert_close(add(True, False)((output, bias), residual, 0.0).detach(), residual + 0.25 * added)
    without_bias = add(True, False)((output + bias, None), residual, 0.0)
    torch.testing.assert_close(without_bias.detach(), residual + 0.25 * added)


def test_a_pass_without_a_backward_keeps_nothing() -> None:
    # Megatron turns gradients on around the sum in every pass.
    output, bias, residual = _tensors()
    assert not _sum(1.0, True)(False, False)((output, bias), residual, 0.0).requires_grad
    output, bias, residual = _tensors(requires_grad=True)
    assert _sum(1.0, True)(True, False)((output, bias), residual, 0.0).requires_grad


@pytest.mark.dist
def test_embedded_tokens_are_multiplied_by_what_their_dtype_can_hold() -> None:
    (embedded,) = run_distributed(embed, 1)
    multiplier = math.sqrt(ARCH.hidden_size)
    for rounded, weight, hidden in embedded:
        factor = torch.tensor(multiplier, dtype=torch.bfloat16) if rounded else multiplier
        assert torch.equal(hidden, weight[3:9] * factor)
    assert not torch.equal(embedded[0][2], embedded[1][2])


def embed() -> list[tuple[bool, Tensor, Tensor]]:
    """Whether the multiplier is rounded, the table in bf16, and the embeddings of tokens 3 to 8."""
    from megatron_rmipo.model.build import build_policy
    from megatron_rmipo.model.megatron_config import transformer_config
    from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime

    groups, found = initialize_runtime(), []
    for rounded in (True, False):
        changes = {"embedding_multiplier": math.sqrt(ARCH.hidden_size), "embedding_multiplier_rounded": rounded}
        arch = dataclasses.replace(ARCH, **changes)
        torch.manual_seed(7)
        model = build_policy(arch, transformer_config(arch, groups, dtype=torch.bfloat16), groups)
        with torch.no_grad():
            ids = torch.arange(3, 9)[None]
            hidden = model.embedding(input_ids=ids, position_ids=ids)[:, 0]
        found.append((rounded, model.embedding.word_embeddings.weight.detach(), hidden))
    shutdown_runtime()
    return found
