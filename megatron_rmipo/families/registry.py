"""The families that are built; the one place that names them all."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_rmipo.families.base import Family
from megatron_rmipo.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from megatron_rmipo.families.llama import LLAMA
from megatron_rmipo.families.mistral import MISTRAL
from megatron_rmipo.families.qwen2 import QWEN2
from megatron_rmipo.families.qwen3 import QWEN3

FAMILIES: Mapping[str, Family] = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, DEEPSEEK_V2, DEEPSEEK_V3)}
