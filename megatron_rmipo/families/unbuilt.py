"""Architectures that are known and not built, and why: the answer to who brings one."""

from __future__ import annotations

from collections.abc import Mapping

_STATE = (
    "the state of its {layers} layers after a prompt would have to be handed to both of its responses, and Megatron-Core's start "
    "every packed sequence from none"
)
_DELTA_NET, _MAMBA = _STATE.format(layers="gated delta net"), _STATE.format(layers="Mamba")

# A value of ``architectures`` -> what stands in the way.
UNBUILT: Mapping[str, str] = {
    "Qwen3NextForCausalLM": _DELTA_NET,
    "Qwen3_5ForCausalLM": _DELTA_NET,
    "Qwen3_5ForConditionalGeneration": _DELTA_NET,
    "Qwen3_5MoeForCausalLM": _DELTA_NET,
    "Qwen3_5MoeForConditionalGeneration": _DELTA_NET,
    "Gemma3ForConditionalGeneration": (
        "its weights have a vision tower, which would be lost. Save its language model as a Gemma3ForCausalLM first; "
        "docs/checkpoints.md says how"
    ),
    "BambaForCausalLM": _MAMBA,
    "FalconH1ForCausalLM": _MAMBA,
    "GraniteMoeHybridForCausalLM": _MAMBA,
    "JambaForCausalLM": _MAMBA,
    "Mamba2ForCausalLM": _MAMBA,
    "MambaForCausalLM": _MAMBA,
    "NemotronHForCausalLM": _MAMBA,
    "Zamba2ForCausalLM": _MAMBA,
}
