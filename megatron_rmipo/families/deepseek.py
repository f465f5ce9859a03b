"""DeepSeek V2 and V3, and what is made like them: multi-head latent attention, and layers of experts behind dense ones.

Source of the names: ``DeepseekV2ForCausalLM`` and ``DeepseekV3ForCausalLM`` of transformers, ``MLASelfAttention`` of
Megatron-Core.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from megatron_rmipo.families.architecture import Experts, LatentAttention
from megatron_rmipo.families.base import Layout, Rule
from megatron_rmipo.families.fields import Fields
from megatron_rmipo.families.llama import COMMON_ONLY, HF_LAYER, LLAMA, MEGATRON_LAYER

_HF, _MEGATRON = HF_LAYER + "self_attn.", MEGATRON_LAYER + "self_attention."


def _read_attention(fields: Fields) -> Mapping[str, object]:
    latent = LatentAttention(
        q_lora_rank=None if fields.get("q_lora_rank") is None else fields.count("q_lora_rank"),
        kv_lora_rank=fields.count("kv_lora_rank"),
        qk_nope_head_dim=fields.count("qk_nope_head_dim"),
        qk_rope_head_dim=fields.count("qk_rope_head_dim"),
        v_head_dim=fields.count("v_head_dim"),
    )
    head_size = latent.qk_nope_head_dim + latent.qk_rope_head_dim
    return {
        "latent": latent,
        "kv_channels": head_size,
        "attention_scale": _read_attention_scale(fields, head_size),
        # Every head has a key of its own, whatever the config says of their number.
        "num_query_groups": fields.count("num_attention_heads"),
        "rotary_channels": latent.qk_rope_head_dim,
        "rotary_interleaved": fields.flag("rope_interleave"),
    }


def _read_attention_scale(fields: Fields, head_size: int) -> float | None:
    """The factor of the scores where a longer context makes it another one than that of the head size.

    Source: ``yarn_apply_mscale`` of transformers.
    """
    rope = fields.mapping("rope_parameters" if fields.get("rope_parameters") else "rope_scaling")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default" or not rope.get("mscale_all_dim"):
        return None
    stretch = 1.0 + 0.1 * rope.number("mscale_all_dim") * math.log(max(rope.number("factor"), 1.0))
    return stretch**2 / math.sqrt(head_size)


def _read_v3(fields: Fields) -> Mapping[str, object]:
    return {**_read_attention(fields), "experts": _read_experts(fields, score_function="sigmoid", score_bias=True)}


def _read_v2(fields: Fields) -> Mapping[str, object]:
    return {**_read_attention(fields), "experts": _read_experts(fields, score_function="softmax", score_bias=False)}


def _read_experts(fields: Fields, *, score_function: str, score_bias: bool) -> Experts | None:
    """The experts behind the first layers; None in a model that is all first layers, of whose experts nothing else is asked."""
    num_layers, num_dense = fields.count("num_hidden_layers"), fields.get("first_k_dense_replace") or 0
    for name in _EXPERT_FIELDS:
        fields.get(name)
    if num_dense >= num_layers:
        return None
    ffn_hidden_size = fields.count("moe_intermediate_size")
    grouped = score_function == "sigmoid"
    return Experts(
        num_experts=fields.count("n_routed_experts"),
        per_token=fields.count("num_experts_per_tok"),
        ffn_hidden_size=ffn_hidden_size,
        dense_layers=frozenset(range(num_dense)),
        shared_ffn_hidden_size=ffn_hidden_size * fields.count("n_shared_experts"),
        score_function=score_function,
        normalized=fields.flag("norm_topk_prob"),
        score_bias=score_bias,
        num_groups=fields.count("n_group") if grouped else None,
        groups_per_token=fields.count("topk_group") if grouped else None,
        scaling=fields.number("routed_scaling_factor"),
    )


_EXPERT_FIELDS = (
    "moe_intermediate_size",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "norm_topk_prob",
    "num_experts_per_tok",
    "routed_scaling_factor",
    "topk_group",
)

# Of the attention, in the place of Llama's.
_LATENT_RULES = (
    Rule(MEGATRON_LAYER + "input_layernorm.weight", (HF_LAYER + "input_layernorm.weight",), Layout.WHOLE),
    Rule(
        _MEGATRON + "linear_q_proj.weight",
        (_HF + "q_proj.weight",),
        Layout.HEAD_ROWS,
        only_with="query_without_latent",
        sizes=("query_size", "hidden_size"),
    ),
    Rule(
        _MEGATRON + "linear_q_down_proj.weight",
        (_HF + "q_a_proj.weight",),
        Layout.WHOLE,
        only_with="query_latent",
        sizes=("latent.q_lora_rank", "hidden_size"),
    ),
    Rule(
        _MEGATRON + "linear_q_up_proj.layer_norm_weight",
        (_HF + "q_a_layernorm.weight",),
        Layout.WHOLE,
        only_with="query_latent",
        sizes=("latent.q_lora_rank",),
    ),
    Rule(
        _MEGATRON + "linear_q_up_proj.weight",
        (_HF + "q_b_proj.weight",),
        Layout.HEAD_ROWS,
        only_with="query_latent",
        sizes=("query_size", "latent.q_lora_rank"),
    ),
    Rule(
        _MEGATRON + "linear_kv_down_proj.weight",
        (_HF + "kv_a_proj_with_mqa.weight",),
        Layout.WHOLE,
        sizes=("latent.key_value_down_size", "hidden_size"),
    ),
    Rule(
        _MEGATRON + "linear_kv_up_proj.layer_norm_weight",
        (_HF + "kv_a_layernorm.weight",),
        Layout.WHOLE,
        sizes=("latent.kv_lora_rank",),
    ),
    Rule(
        _MEGATRON + "linear_kv_up_proj.weight",
        (_HF + "kv_b_proj.weight",),
        Layout.HEAD_ROWS,
        sizes=("key_value_up_size", "latent.kv_lora_rank"),
    ),
)
_OTHERS = tuple(rule for rule in LLAMA.rules if "linear_qkv" not in rule.megatron)

DEEPSEEK_V3 = dataclasses.replace(
    LLAMA,
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    only={
        **COMMON_ONLY,
        "attention_bias": (False, None),
        # transformers norms the latents with this one whatever the config says of the others.
        "rms_norm_eps": (1e-6,),
        "moe_layer_freq": (1, None),
        "scoring_func": ("sigmoid", None),
        "topk_method": ("noaux_tc", None),
    },
    defaults={
        **LLAMA.defaults,
        "max_position_embeddings": 4096,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_interleave": True,
        "first_k_dense_replace": 3,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    rules=(_OTHERS[0], *_LATENT_RULES, *_OTHERS[1:]),
    # Head sizes follow from others; layers that predict further tokens are left out, as transformers leaves them out.
    unread=("head_dim", "qk_head_dim", "num_nextn_predict_layers", "ep_size", "aux_loss_alpha", "seq_aux"),
    ignored=(*LLAMA.ignored, r"model\.layers\.61\..*"),
    switches={},
    read=_read_v3,
)

DEEPSEEK_V2 = dataclasses.replace(
    DEEPSEEK_V3,
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    only={
        **DEEPSEEK_V3.only,
        "mlp_bias": (False, None),
        "scoring_func": ("softmax", None),
        # Its groups of experts are scored by their best one, which Megatron-Core has no router for.
        "topk_method": ("greedy", None),
    },
    defaults={
        **DEEPSEEK_V3.defaults,
        "max_position_embeddings": 2048,
        "num_key_value_heads": None,
        "first_k_dense_replace": 0,
        "moe_intermediate_size": 1407,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": None,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    ignored=LLAMA.ignored,
    read=_read_v2,
)
