"""Sparse models of the multi-process tests. Of the kind "shared", which no family has, the weights as each rank holds them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rmipo.families.architecture import Experts, ModelArchitecture, Rope
from megatron_rmipo.model.policy import PolicyModel
from megatron_rmipo.runtime.groups import ProcessGroups
from tests.integration.problem import VOCAB, make_hf_model

# Kind -> (what it is, what its Hugging Face config says beside the sizes of make_hf_model).
KINDS: dict[str, tuple[Experts, dict[str, Any]]] = {
    "mixtral": (
        Experts(num_experts=6, per_token=2, ffn_hidden_size=20),
        {"model_type": "mixtral", "num_local_experts": 6, "intermediate_size": 20},
    ),
    "shared": (
        Experts(
            num_experts=8,
            per_token=4,
            ffn_hidden_size=12,
            dense_layers=frozenset({0}),
            shared_ffn_hidden_size=24,
            score_function="sigmoid",
            score_bias=True,
            num_groups=4,
            groups_per_token=2,
            scaling=1.5,
        ),
        {
            "model_type": "glm4_moe",
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 12,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "head_dim": 12,
            "partial_rotary_factor": 1.0,
        },
    ),
}


def architecture(kind: str) -> ModelArchitecture:
    """A model of a kind."""
    return ModelArchitecture(
        family="llama",
        num_layers=4,
        hidden_size=48,
        ffn_hidden_size=104,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=12,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        ropes=(Rope(1e4),),
        layernorm_epsilon=1e-5,
        experts=KINDS[kind][0],
    )


def make_model(directory: Path) -> Path:
    """A Hugging Face model of the kind "shared", with random score biases."""
    from transformers import AutoModelForCausalLM

    make_hf_model(directory, rope_theta=1e4, **KINDS["shared"][1])
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for name, tensor in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(0.3 * torch.randn_like(tensor))
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            # So that the choice of experts is not a matter of rounding.
            parameter.data = 0.3 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return directory


def own_tensors(source: Mapping[str, Tensor], policy: PolicyModel, groups: ProcessGroups) -> dict[str, Tensor]:
    """This rank's part of tensors that go by their names in a checkpoint of the kind "shared", by the policy's names."""
    arch = policy.architecture
    assert arch.experts is not None
    per_stage, per_rank = arch.num_layers // groups.pp_size, arch.experts.num_experts // groups.ep.size()

    def cut(tensor: Tensor, dim: int, group: Any = groups.tp) -> Tensor:
        return tensor.chunk(group.size(), dim)[group.rank()]

    def gate_up(gate: Tensor, up: Tensor, group: Any = groups.tp) -> Tensor:
        return torch.cat([cut(gate, 0, group), cut(up, 0, group)])

    padding = (
        (0, 0, 0, policy.embedding.word_embeddings.weight.shape[0] * groups.tp_size - VOCAB) if groups.is_first_stage else ()
    )
    own: dict[str, Tensor] = {}
    if groups.is_first_stage:
        embedding = torch.nn.functional.pad(source["model.embed_tokens.weight"], padding)
        own["embedding.word_embeddings.weight"] = cut(embedding, 0)
    if groups.is_last_stage:
        own["decoder.final_layernorm.weight"] = source["model.norm.weight"]
        rows = policy.output_layer.weight.shape[0] * groups.tp_size - VOCAB
        own["output_layer.weight"] = cut(torch.nn.functional.pad(source["lm_head.weight"], (0, 0, 0, rows)), 0)
    for number in range(per_stage):
        theirs, ours = f"model.layers.{groups.pp_rank * per_stage + number}.", f"decoder.layers.{number}."
        part = lambda name, prefix=theirs: source[f"{prefix}{name}"]  # noqa: E731
        qkv = [part(f"self_attn.{name}_proj.weight") for name in "qkv"]
        grouped = torch.cat([one.view(arch.num_query_groups, -1, arch.hidden_size) for one in qkv], dim=1)
        own[ours + "self_attention.linear_qkv.weight"] = cut(grouped.flatten(0, 1), 0)
        own[ours + "self_attention.linear_proj.weight"] = cut(part("self_attn.o_proj.weight"), 1)
        own[ours + "input_layernorm.weight"] = part("input_layernorm.weight")
        own[ours + "pre_mlp_layernorm.weight"] = part("post_attention_layernorm.weight")
        dense = {"mlp.": "mlp."} if theirs + "mlp.gate.weight" not in source else {"mlp.shared_experts.": "mlp.shared_experts."}
        for prefix in (prefix for prefix in dense if f"{theirs}{prefix}gate_proj.weight" in source):
            own[f"{ours}{prefix}linear_fc1.weight"] = gate_up(part(prefix + "gate_proj.weight"), part(prefix + "up_proj.weight"))
            own[f"{ours}{prefix}linear_fc2.weight"] = cut(part(prefix + "down_proj.weight"), 1)
        if theirs + "mlp.gate.weight" not in source:
            continue
        own[ours + "mlp.router.weight"] = part("mlp.gate.weight")
        if theirs + "mlp.gate.e_score_correction_bias" in source:
            own[ours + "mlp.router.expert_bias"] = part("mlp.gate.e_score_correction_bias")
        for local in range(per_rank):
            expert, name = f"mlp.experts.{groups.ep.rank() * per_rank + local}.", f"{ours}mlp.experts.local_experts.{local}."
            gate, up = part(expert + "gate_proj.weight"), part(expert + "up_proj.weight")
            own[name + "linear_fc1.weight"] = gate_up(gate, up, groups.expert_tp)
            own[name + "linear_fc2.weight"] = cut(part(expert + "down_proj.weight"), 1, groups.expert_tp)
    return own


def load(policy: PolicyModel, directory: Path, groups: ProcessGroups) -> None:
    """Give the policy the weights of a model of :func:`make_model`."""
    own = own_tensors(load_file(directory / "model.safetensors"), policy, groups)
    tensors = dict(policy.named_parameters()) | {
        name: buffer for name, buffer in policy.named_buffers() if name.endswith("expert_bias")
    }
    assert tensors.keys() == own.keys()
    for name, tensor in tensors.items():
        tensor.data.copy_(own[name])
