"""GLM-4 of 2025 (0414), and GLM-Z1: the elder one with norms after attention and MLP, too.

Source of the names: ``Glm4ForCausalLM`` of transformers; Megatron-Bridge for norms behind a linear.
"""

from __future__ import annotations

import dataclasses

from megatron_rmipo.families.glm import GLM
from megatron_rmipo.families.norm_places import norms_after

GLM4 = dataclasses.replace(
    GLM,
    name="glm4",
    architectures=("Glm4ForCausalLM",),
    # The norm before the MLP keeps the name that it has in Llama.
    rules=(*GLM.rules, *norms_after("post_self_attn_layernorm", "post_mlp_layernorm")),
    always=(*GLM.always, "post_norm"),
)
