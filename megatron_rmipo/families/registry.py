"""The families that are built; the one place that names them all."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_rmipo.families.base import Family
from megatron_rmipo.families.gemma import GEMMA
from megatron_rmipo.families.gemma2 import GEMMA2
from megatron_rmipo.families.gemma3 import GEMMA3
from megatron_rmipo.families.granite import GRANITE
from megatron_rmipo.families.llama import LLAMA
from megatron_rmipo.families.ministral import MINISTRAL, MINISTRAL3
from megatron_rmipo.families.mistral import MISTRAL
from megatron_rmipo.families.mixtral import MIXTRAL
from megatron_rmipo.families.olmo2 import OLMO2
from megatron_rmipo.families.olmo3 import OLMO3
from megatron_rmipo.families.phi3 import PHI3
from megatron_rmipo.families.qwen2 import QWEN2
from megatron_rmipo.families.qwen3 import QWEN3
from megatron_rmipo.families.smollm3 import SMOLLM3

_ALL = (
    *(LLAMA, MISTRAL, MINISTRAL, MINISTRAL3, QWEN2, QWEN3, SMOLLM3, PHI3, GRANITE),
    *(OLMO2, OLMO3, GEMMA, GEMMA2, GEMMA3),
    MIXTRAL,
)
FAMILIES: Mapping[str, Family] = {family.name: family for family in _ALL}

# Architectures that hold more than a model of text, and why they are refused.
REFUSED: Mapping[str, str] = {
    "Gemma3ForConditionalGeneration": (
        "its weights have a vision tower, which would be lost. Save its language model as a Gemma3ForCausalLM first; "
        "docs/checkpoints.md says how"
    )
}
