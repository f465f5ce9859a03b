"""The families that are built; the one place that names them all."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_rmipo.families.base import Family
from megatron_rmipo.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from megatron_rmipo.families.gemma import GEMMA
from megatron_rmipo.families.gemma2 import GEMMA2
from megatron_rmipo.families.gemma3 import GEMMA3
from megatron_rmipo.families.glm import GLM
from megatron_rmipo.families.glm4 import GLM4
from megatron_rmipo.families.glm4_moe import GLM4_MOE
from megatron_rmipo.families.gpt_oss import GPT_OSS
from megatron_rmipo.families.granite import GRANITE
from megatron_rmipo.families.llama import LLAMA
from megatron_rmipo.families.ministral import MINISTRAL, MINISTRAL3
from megatron_rmipo.families.mistral import MISTRAL
from megatron_rmipo.families.mixtral import MIXTRAL
from megatron_rmipo.families.olmo2 import OLMO2
from megatron_rmipo.families.olmo3 import OLMO3
from megatron_rmipo.families.olmoe import OLMOE
from megatron_rmipo.families.phi3 import PHI3
from megatron_rmipo.families.qwen2 import QWEN2
from megatron_rmipo.families.qwen2_moe import QWEN2_MOE
from megatron_rmipo.families.qwen3 import QWEN3
from megatron_rmipo.families.qwen3_moe import QWEN3_MOE
from megatron_rmipo.families.smollm3 import SMOLLM3

_ALL = (
    *(LLAMA, MISTRAL, MINISTRAL, MINISTRAL3, QWEN2, QWEN3, SMOLLM3, PHI3),
    *(OLMO2, OLMO3, GEMMA, GEMMA2, GEMMA3, GLM, GLM4, GRANITE),
    *(MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, GPT_OSS, DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE),
)
FAMILIES: Mapping[str, Family] = {family.name: family for family in _ALL}
