"""OLMo 3: OLMo 2 with sliding windows in three of four layers, and rotary scaling in the fourth.

Source of the names: ``Olmo3ForCausalLM`` of transformers, which are OLMo 2's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megatron_rmipo.families.fields import Fields
from megatron_rmipo.families.layer_ropes import read_layers
from megatron_rmipo.families.olmo2 import OLMO2


def _read(fields: Fields) -> Mapping[str, object]:
    return {"pre_norm": False, **read_layers(fields, period=4, sliding_base="rope_theta")}


OLMO3 = dataclasses.replace(
    OLMO2,
    name="olmo3",
    architectures=("Olmo3ForCausalLM",),
    defaults={**OLMO2.defaults, "rope_theta": 500000.0, "sliding_window": 4096},
    read=_read,
)
