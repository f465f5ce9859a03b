"""Llama 2, 3, 3.1 and 3.2. Source of the names: ``LlamaForCausalLM`` of transformers, ``GPTModel`` of Megatron-Core."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_rmipo.families.base import Family, Layout, Rule

HF_LAYER = "model.layers.{layer}."
MEGATRON_LAYER = "decoder.layers."

# What families of this kind have in common: no other activation, no dropout, whole heads rotated.
COMMON_ONLY: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0, None),
    "partial_rotary_factor": (1.0, None),
}

ATTENTION_BIAS: Mapping[str, tuple[str, ...]] = {"attention_bias": ("qkv_bias", "attention_output_bias")}

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    only=COMMON_ONLY,
    defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": 10000.0},
    rules=(
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Layout.VOCABULARY),
        Rule(
            MEGATRON_LAYER + "self_attention.linear_qkv.layer_norm_weight", (HF_LAYER + "input_layernorm.weight",), Layout.WHOLE
        ),
        Rule(
            MEGATRON_LAYER + "self_attention.linear_qkv.weight",
            (HF_LAYER + "self_attn.q_proj.weight", HF_LAYER + "self_attn.k_proj.weight", HF_LAYER + "self_attn.v_proj.weight"),
            Layout.QKV,
        ),
        Rule(
            MEGATRON_LAYER + "self_attention.linear_qkv.bias",
            (HF_LAYER + "self_attn.q_proj.bias", HF_LAYER + "self_attn.k_proj.bias", HF_LAYER + "self_attn.v_proj.bias"),
            Layout.QKV,
            only_with="qkv_bias",
        ),
        Rule(MEGATRON_LAYER + "self_attention.linear_proj.weight", (HF_LAYER + "self_attn.o_proj.weight",), Layout.HEAD_COLUMNS),
        Rule(
            MEGATRON_LAYER + "self_attention.linear_proj.bias",
            (HF_LAYER + "self_attn.o_proj.bias",),
            Layout.WHOLE,
            only_with="attention_output_bias",
        ),
        Rule(MEGATRON_LAYER + "mlp.linear_fc1.layer_norm_weight", (HF_LAYER + "post_attention_layernorm.weight",), Layout.WHOLE),
        Rule(
            MEGATRON_LAYER + "mlp.linear_fc1.weight",
            (HF_LAYER + "mlp.gate_proj.weight", HF_LAYER + "mlp.up_proj.weight"),
            Layout.GATE_UP,
        ),
        Rule(
            MEGATRON_LAYER + "mlp.linear_fc1.bias",
            (HF_LAYER + "mlp.gate_proj.bias", HF_LAYER + "mlp.up_proj.bias"),
            Layout.GATE_UP,
            only_with="mlp_bias",
        ),
        Rule(MEGATRON_LAYER + "mlp.linear_fc2.weight", (HF_LAYER + "mlp.down_proj.weight",), Layout.FFN_COLUMNS),
        Rule(MEGATRON_LAYER + "mlp.linear_fc2.bias", (HF_LAYER + "mlp.down_proj.bias",), Layout.WHOLE, only_with="mlp_bias"),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",), Layout.WHOLE),
        Rule("output_layer.weight", ("lm_head.weight",), Layout.VOCABULARY),
    ),
    # Older checkpoints keep the rotary frequencies, which the config determines.
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    unread=("sliding_window",),
    switches={**ATTENTION_BIAS, "mlp_bias": ("mlp_bias",)},
)
