"""The words of Megatron-Core's configuration are fields that it has."""

from __future__ import annotations

import dataclasses

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_rmipo.families.architecture import Experts, LatentAttention, ModelArchitecture, Rope
from megatron_rmipo.families.megatron_fields import expert_fields, latent_fields, megatron_fields


def test_every_name_is_a_field() -> None:
    experts = Experts(num_experts=6, per_token=2, ffn_hidden_size=20, dense_layers=frozenset({0}))
    arch = ModelArchitecture(
        "llama", 3, 48, 88, 6, 2, 8, 203, 64, ropes=(Rope(10000.0),), layernorm_epsilon=1e-5, experts=experts
    )
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    of_latents = {field.name for field in dataclasses.fields(MLATransformerConfig)}
    assert megatron_fields(arch).keys() <= known
    assert expert_fields(arch, experts).keys() <= known
    assert expert_fields(arch, experts)["moe_layer_freq"] == [0, 1, 1]
    assert latent_fields(LatentAttention(None, 12, 10, 6, 9)).keys() <= of_latents
