"""From the names of a Megatron module's parameters to those of its distributed checkpoints."""

from __future__ import annotations

import re

from megatron_rmipo.families.base import Place

# A tensor by its Megatron name and where it stands.
TensorId = tuple[str, Place]

# The local layer spec names the norms apart; in distributed checkpoints, and in TE's layers, the next linear owns them, where
# one takes their output. Those behind a linear stand in the sum that follows it.
_LOCAL_NAMES = {
    "decoder.layers.input_layernorm.weight": "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
    "decoder.layers.pre_mlp_layernorm.weight": "decoder.layers.mlp.linear_fc1.layer_norm_weight",
    "decoder.layers.self_attn_bda.post_layernorm.weight": "decoder.layers.self_attention.linear_proj.post_layernorm.weight",
    "decoder.layers.mlp_bda.post_layernorm.weight": "decoder.layers.mlp.linear_fc2.post_layernorm.weight",
    "decoder.layers.self_attention.q_layernorm.weight": "decoder.layers.self_attention.linear_q_up_proj.layer_norm_weight",
    "decoder.layers.self_attention.kv_layernorm.weight": "decoder.layers.self_attention.linear_kv_up_proj.layer_norm_weight",
}

# HybridModel names the norm behind the last layer otherwise than GPTModel and checkpoints do.
_FINAL_NORM = {"decoder.final_norm.weight": "decoder.final_layernorm.weight"}
_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# Experts one by one, and all of a rank in one grouped linear layer.
_EXPERT_NAMES = (
    re.compile(r"(?P<before>mlp\.experts\.)local_experts\.(?P<expert>\d+)\.(?P<after>.+)"),
    re.compile(r"(?P<before>mlp\.experts\.)(?P<after>linear_fc[12]\.(?:weight|bias))(?P<expert>\d+)"),
)


def canonical_names(parameter: str) -> tuple[tuple[str, ...], Place]:
    """Checkpoint names that a module's parameter may have, without numbers, and its place as the module counts.

    Its own name is first; which it is depends on what the layer holds.
    """
    match = _LAYER_NAME.fullmatch(parameter)
    if not match:
        return (_FINAL_NORM.get(parameter, parameter),), Place()
    rest, expert = match[2], None
    for pattern in _EXPERT_NAMES:
        if found := pattern.fullmatch(rest):
            rest, expert = f"{found['before']}experts.{found['after']}", int(found["expert"])
    name = f"decoder.layers.{rest}"
    names = (name, _LOCAL_NAMES[name]) if name in _LOCAL_NAMES else (name,)
    return names, Place(int(match[1]), expert)
