"""Llama 2, 3, 3.1 and 3.2. Source of the names: ``LlamaForCausalLM`` of transformers, ``GPTModel`` of Megatron-Core."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_rmipo.families.base import Family, Layout, Rule

_HF = "model.layers.{layer}."
_MEGATRON = "decoder.layers."

# What families of this kind have in common: no other activation, no dropout, nothing quantized, whole heads rotated.
COMMON_ONLY: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0.0, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
}

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    only=COMMON_ONLY,
    defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "sliding_window": None},
    has_sliding_window=False,
    rules=(
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Layout.VOCABULARY),
        Rule(_MEGATRON + "self_attention.linear_qkv.layer_norm_weight", (_HF + "input_layernorm.weight",), Layout.WHOLE),
        Rule(
            _MEGATRON + "self_attention.linear_qkv.weight",
            (_HF + "self_attn.q_proj.weight", _HF + "self_attn.k_proj.weight", _HF + "self_attn.v_proj.weight"),
            Layout.QKV,
        ),
        Rule(
            _MEGATRON + "self_attention.linear_qkv.bias",
            (_HF + "self_attn.q_proj.bias", _HF + "self_attn.k_proj.bias", _HF + "self_attn.v_proj.bias"),
            Layout.QKV,
            only_with="qkv_bias",
        ),
        Rule(_MEGATRON + "self_attention.linear_proj.weight", (_HF + "self_attn.o_proj.weight",), Layout.HEAD_COLUMNS),
        Rule(
            _MEGATRON + "self_attention.linear_proj.bias",
            (_HF + "self_attn.o_proj.bias",),
            Layout.WHOLE,
            only_with="attention_output_bias",
        ),
        Rule(_MEGATRON + "mlp.linear_fc1.layer_norm_weight", (_HF + "post_attention_layernorm.weight",), Layout.WHOLE),
        Rule(
            _MEGATRON + "mlp.linear_fc1.weight",
            (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
            Layout.GATE_UP,
        ),
        Rule(
            _MEGATRON + "mlp.linear_fc1.bias",
            (_HF + "mlp.gate_proj.bias", _HF + "mlp.up_proj.bias"),
            Layout.GATE_UP,
            only_with="mlp_bias",
        ),
        Rule(_MEGATRON + "mlp.linear_fc2.weight", (_HF + "mlp.down_proj.weight",), Layout.FFN_COLUMNS),
        Rule(_MEGATRON + "mlp.linear_fc2.bias", (_HF + "mlp.down_proj.bias",), Layout.WHOLE, only_with="mlp_bias"),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",), Layout.WHOLE),
        Rule("output_layer.weight", ("lm_head.weight",), Layout.VOCABULARY),
    ),
    # Older checkpoints keep the rotary frequencies, which the config determines.
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    switches={"attention_bias": ("qkv_bias", "attention_output_bias"), "mlp_bias": ("mlp_bias",)},
)
