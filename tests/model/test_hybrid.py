"""A policy of the class HybridModel beside one of GPTModel: patterns, keys of checkpoints, and what layers of experts compute."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

from megatron_rmipo.config.schema import Config, ModelConfig
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.families.architecture import Experts, LayerKind, ModelArchitecture, Rope
from megatron_rmipo.model import build as build_module
from megatron_rmipo.model.build import build_policy
from megatron_rmipo.model.hybrid import HybridModel, layer_pattern
from megatron_rmipo.model.megatron_config import transformer_config
from megatron_rmipo.model.policy import PolicyModel
from megatron_rmipo.model.problems import layout as layout_problems
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime
from tests.harness import run_distributed

DENSE = ModelArchitecture(
    family="llama",
    num_layers=3,
    hidden_size=24,
    ffn_hidden_size=28,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=4,
    vocab_size=53,
    max_position_embeddings=64,
    ropes=(Rope(1e4),),
    layer_kinds=(LayerKind(), LayerKind(rope=None), LayerKind()),
    layernorm_epsilon=1e-5,
)
EXPERTS = Experts(num_experts=6, per_token=2, ffn_hidden_size=10, shared_ffn_hidden_size=14)
MODELS = {
    "dense": DENSE,
    "sparse": dataclasses.replace(DENSE, experts=EXPERTS),
    "dense first": dataclasses.replace(DENSE, experts=dataclasses.replace(EXPERTS, dense_layers=frozenset({0}))),
}


def test_the_pattern_has_attention_and_mlp_of_each_layer_stage_by_stage() -> None:
    assert layer_pattern(MODELS["dense first"], [[range(3)]]) == "*-*E*E"
    assert layer_pattern(DENSE, [[range(1)], [range(1, 2)], [range(2, 3)]]) == "*-|*-|*-"


def test_the_class_is_refused_by_its_flag_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_problems, "HybridModel", None)
    monkeypatch.setattr(build_module, "HybridPolicy", None)
    problems = list(layout_problems.machine_problems(Config(model=ModelConfig(model_class="hybrid"))))
    assert len(problems) == 1
    assert problems[0].startswith("--model-class hybrid: the installed megatron-core has no HybridModel")
    groups: Any = type("Groups", (), {"tp_size": 1, "pp_size": 1, "cp_size": 1})
    with pytest.raises(ConfigError, match=r"--model-class hybrid: .* has no HybridModel"):
        build_policy(DENSE, transformer_config(DENSE, groups), groups, model_class="hybrid")


@pytest.mark.dist
@pytest.mark.skipif(HybridModel is None, reason="this megatron-core has no HybridModel")
@pytest.mark.parametrize("ranks", [1, 2])
def test_both_classes_compute_the_same_and_save_under_the_same_keys(ranks: int) -> None:
    for found in run_distributed(both_classes, ranks):
        compare(found)


def compare(found: dict[str, Any]) -> None:
    for name, ((scores, gradients, keys), (other_scores, other_gradients, other_keys)) in found.items():
        torch.testing.assert_close(other_scores, scores, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert other_gradients.keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            # Experts that nothing goes through have none.
            error = (other_gradients[parameter] - gradient).norm() / gradient.norm().clamp(min=1e-20)
            assert error < 1e-6, (name, parameter, float(error))
        assert other_keys == keys
        assert any("layers.0." in key for key, _ in keys) == (name == "dense first")


def both_classes() -> dict[str, Any]:
    """What both classes of each model say on this rank; two of them share the experts."""
    groups = initialize_runtime(expert_model_parallel_size=int(os.environ["WORLD_SIZE"]))
    found = {}
    for name, arch in MODELS.items():
        config = transformer_config(arch, groups)
        gpt, hybrid = (build_policy(arch, config, groups, model_class=kind) for kind in ("gpt", "hybrid"))
        weights = dict(gpt.named_parameters())
        with torch.no_grad():
            for parameter, value in hybrid.named_parameters():
                value.copy_(weights[name_in_gpt(parameter)])
        found[name] = observe(gpt), observe(hybrid)
    shutdown_runtime()
    return found


def name_in_gpt(parameter: str) -> str:
    """What GPTModel calls a parameter of HybridModel."""
    parts = parameter.replace("final_norm", "final_layernorm").split(".")
    if parts[1] == "layers":
        parts[2] = str(int(parts[2]) // 2)
    return ".".join(parts)


def observe(model: PolicyModel) -> tuple[Tensor, dict[str, Tensor], list[tuple[str, Any]]]:
    """Log-probs of a row, gradients by the names of GPTModel, and key and whole shape of what a checkpoint holds."""
    row = {
        "token_ids": torch.arange(12) % 7,
        "position_ids": torch.tensor([0, 1, 2, 3, 4, 5, 3, 4, 5, 0, 1, 2]),
        "segments": torch.tensor([[0, 6, 0, 0], [6, 3, 0, 3], [9, 3, 0, 0]]),
        "source": torch.arange(12),
        "target": torch.arange(12),
    }
    scores = model(**row)
    (scores * torch.linspace(-1, 1, 12)).sum().backward()
    gradients = {name_of(model, name): value.grad for name, value in model.named_parameters() if value.grad is not None}
    held = nested_values(model.sharded_state_dict(metadata={"dp_cp_group": torch.distributed.group.WORLD}))
    stored = [
        part for item in held for part in (nested_values(item.build()) if isinstance(item, ShardedTensorFactory) else [item])
    ]
    keys = sorted((part.key, tuple(part.global_shape)) for part in stored)
    return scores.detach(), gradients, keys


def name_of(model: PolicyModel, name: str) -> str:
    return name_in_gpt(name) if model.layers_each == 2 else name
