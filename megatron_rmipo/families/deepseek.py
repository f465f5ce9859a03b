"""DeepSeek V2 and V3, and what is made like them: multi-head latent attention, and layers of experts behind dense ones.

Source of the names: ``DeepseekV2ForCausalLM`` and ``DeepseekV3ForCausalLM`` of transformers, ``MLASelfAttention`` of
Megatron-Core.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

from megatron_rmipo.families.architecture import Experts, LatentAttention
from megatron_rmipo.families.base import Layout, Rule
from megatron_rmipo.families.expert_rules import expert_rules, router_rules, shared_expert_rules, sparse_rules
from megatron_rmipo.families.fields import Fields
from megatron_rmipo.families.llama import COMMON_ONLY, HF_LAYER, LLAMA, MEGATRON_LAYER
from megatron_rmipo.families.rope import latent_score_factor

_HF, _MEGATRON = HF_LAYER + "self_attn.", MEGATRON_LAYER + "self_attention."


def _read_attention(fields: Fields) -> Mapping[str, object]:
    latent = LatentAttention(
        q_lora_rank=None if fields.get("q_lora_rank") is None else fields.count("q_lora_rank"),
        kv_lora_rank=fields.count("kv_lora_rank"),
        qk_nope_head_dim=fields.count("qk_nope_head_dim"),
        qk_rope_head_dim=fields.count("qk_rope_head_dim"),
        v_head_dim=fields.count("v_head_dim"),
    )
    head_size, factor = latent.qk_nope_head_dim + latent.qk_rope_head_dim, latent_score_factor(fields)
    return {
        "latent": latent,
        "kv_channels": head_size,
        "attention_scale": None if factor == 1.0 else factor / math.sqrt(head_size),
        # Every head has a key of its own, whatever the config says of their number.
        "num_query_groups": fields.count("num_attention_heads"),
        "rotary_channels": latent.qk_rope_head_dim,
        "rotary_interleaved": fields.flag("rope_interleave"),
    }


def _read_v3(fields: Fields) -> Mapping[str, object]:
    return {**_read_attention(fields), "experts": read_sigmoid_experts(fields)}


def _read_v2(fields: Fields) -> Mapping[str, object]:
    return {**_read_attention(fields), "experts": _read_experts(fields, _read_softmax_experts)}


def _read_experts(fields: Fields, read: Callable[[Fields], Experts]) -> Experts | None:
    """The experts behind dense layers; where there is none but those, nothing is asked of experts."""
    for name in _EXPERT_FIELDS:
        fields.get(name)
    return read(fields) if _num_dense(fields) < fields.count("num_hidden_layers") else None


def _num_dense(fields: Fields) -> int:
    return fields.count("first_k_dense_replace") if fields.get("first_k_dense_replace") else 0


def read_sigmoid_experts(fields: Fields) -> Experts | None:
    """Experts as V3 has them, some shared, behind dense layers: sigmoids that biases are added to, where experts are chosen.

    Returns:
        The experts; None in a model that is all dense layers.

    Raises:
        ConversionError: a value that is not supported, with its field.
    """
    return _read_experts(fields, _read_sigmoid_experts)


def _read_sigmoid_experts(fields: Fields) -> Experts:
    experts = _read_softmax_experts(fields)
    groups, groups_per_token = fields.count("n_group"), fields.count("topk_group")
    # All of the groups are no choice.
    chooses = groups_per_token < groups
    return dataclasses.replace(
        experts,
        score_function="sigmoid",
        score_bias=True,
        num_groups=groups if chooses else None,
        groups_per_token=groups_per_token if chooses else None,
    )


def _read_softmax_experts(fields: Fields) -> Experts:
    ffn_hidden_size = fields.count("moe_intermediate_size")
    return Experts(
        num_experts=fields.count("n_routed_experts"),
        per_token=fields.count("num_experts_per_tok"),
        ffn_hidden_size=ffn_hidden_size,
        dense_layers=frozenset(range(_num_dense(fields))),
        shared_ffn_hidden_size=ffn_hidden_size * fields.count("n_shared_experts"),
        normalized=fields.flag("norm_topk_prob"),
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
# Of experts, in the place of the MLP.
EXPERT_RULES = (
    *router_rules("mlp.gate"),
    *expert_rules("mlp.experts.{expert}"),
    *shared_expert_rules("mlp.shared_experts"),
)

DEEPSEEK_V3 = dataclasses.replace(
    LLAMA,
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    only={
        **COMMON_ONLY,
        "attention_bias": (False, None),
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
    rules=sparse_rules((_OTHERS[0], *_LATENT_RULES, *_OTHERS[1:]), EXPERT_RULES),
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
        # transformers has neither another router nor keys turned half by half.
        "norm_topk_prob": (False, None),
        "rope_interleave": (True, None),
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
