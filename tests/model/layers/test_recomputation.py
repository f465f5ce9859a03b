"""What selective recomputation saves: bytes that the backward pass of a row finds kept, by module, and the same gradients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_rmipo.checkpoint.hf.weights import load_hf_weights
from megatron_rmipo.config.flags.memory import MemoryConfig
from megatron_rmipo.config.schema import Config, ModelConfig
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.build import build_model
from megatron_rmipo.model.layers.recomputation import recompute_module_problems
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime
from tests.checkpoint.models import write_hf_model
from tests.integration.problem import collection, make_pairs
from tests.integration.worlds import Case, build_batches

# Model -> modules, and the least and the largest share of what is kept that they save.
SAVED: dict[str, list[tuple[list[str], float, float]]] = {
    "llama2": [
        (["core_attn"], 0.08, 0.15),
        (["layernorm"], 0.12, 0.2),
        (["mlp"], 0.3, 0.45),
        (["core_attn", "layernorm", "mlp"], 0.58, 0.7),
    ],
    # Dense and sparse layers, shared experts, latents.
    "deepseek_v3": [
        (["moe"], 0.2, 0.35),
        (["shared_experts"], 0.02, 0.1),
        # Attention over segments keeps copies of what it is given, so the projections alone save little.
        (["core_attn"], 0.08, 0.15),
        (["core_attn", "mla_up_proj"], 0.2, 0.3),
        (["core_attn", "mla_up_proj", "layernorm", "mlp", "moe"], 0.7, 0.85),
    ],
}


@pytest.fixture(scope="module")
def groups() -> Iterator[ProcessGroups]:
    yield initialize_runtime()
    shutdown_runtime()


def kept_and_gradients(hf: Path, modules: list[str], groups: ProcessGroups) -> tuple[int, dict[str, Tensor]]:
    """Bytes kept of one row after its forward pass, weights left out, and the gradients of its log-probs' sum."""
    selective: dict[str, Any] = {"recompute_granularity": "selective"} if modules else {}
    config = Config(
        model=ModelConfig(make_vocab_size_divisible_by=8, logprob_chunk_size=16, **selective),
        memory=MemoryConfig(recompute_modules=modules or None),  # type: ignore[arg-type]
    )
    arch = read_architecture(hf)
    assert not list(recompute_module_problems(config, arch))
    policy = build_model(arch, config, groups)
    load_hf_weights(policy, hf, arch, groups=groups)
    row = build_batches(Case("row"), collection(make_pairs()), policy, groups).build(np.arange(4)).conditional[0]
    (model,) = policy
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = model(row.token_ids, row.position_ids, row.segments, row.source, row.target)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    # Now, when what a norm gave has been given back.
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    scores.sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return sum(size for place, size in storages.items() if place not in weights), gradients


@pytest.mark.parametrize("kind", SAVED)
def test_each_module_saves_what_it_kept(kind: str, tmp_path: Path, groups: ProcessGroups) -> None:
    hf = write_hf_model(tmp_path, kind)
    all_kept, expected = kept_and_gradients(hf, [], groups)
    for modules, least, most in SAVED[kind]:
        kept, gradients = kept_and_gradients(hf, modules, groups)
        assert least < 1 - kept / all_kept < most, (modules, 1 - kept / all_kept)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].abs().max()))
