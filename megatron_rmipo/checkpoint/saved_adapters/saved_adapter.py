"""The adapter that a checkpoint holds, as one of each Hugging Face projection."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from megatron_rmipo.model.lora.plan import AdapterPlan


@dataclasses.dataclass(frozen=True)
class SavedAdapter:
    """An adapter, whole.

    Attributes:
        plan: what it changes.
        factors: projection -> ``lora_A``, ``lora_B`` and with DoRA ``lora_magnitude_vector``, fp32, as
            :func:`megatron_rmipo.checkpoint.peft.writing.write_adapter` takes them.
        whole: tensor that was trained whole, by its Hugging Face name.
    """

    plan: AdapterPlan
    factors: Mapping[str, Mapping[str, Tensor]]
    whole: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
