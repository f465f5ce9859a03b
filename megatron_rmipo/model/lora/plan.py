"""What an adapter changes of a model: which projections, by how wide a product, and what is trained whole beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_rmipo.config.flags.lora import LoraConfig
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Place
from megatron_rmipo.families.parameter_names import TensorId
from megatron_rmipo.families.targets import modules_to_save, targeted
from megatron_rmipo.model.lora.projections import LowRankShape, projection_names


@dataclasses.dataclass(frozen=True)
class AdapterPlan:
    """What an adapter changes.

    Attributes:
        projections: name of a projection, as Hugging Face has it -> its adapter. Of experts the parameter of all of a layer.
        use_dora: rows of the changed weights have trained lengths.
        shares_experts: all experts of a layer have one adapter, instead of one each.
        trained_whole: tensors without adapter that are trained themselves.
    """

    projections: Mapping[str, LowRankShape]
    use_dora: bool = False
    shares_experts: bool = False
    trained_whole: frozenset[TensorId] = frozenset()

    def as_record(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return {
            "projections": {name: list(shape) for name, shape in self.projections.items()},
            "use_dora": self.use_dora,
            "shares_experts": self.shares_experts,
            "trained_whole": sorted([name, *place] for name, place in self.trained_whole),
        }

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> AdapterPlan:
        """What :meth:`as_record` gave."""
        return cls(
            {name: LowRankShape(*shape) for name, shape in record["projections"].items()},
            record["use_dora"],
            record["shares_experts"],
            frozenset((name, Place(layer, expert)) for name, layer, expert in record["trained_whole"]),
        )


def plan_of_flags(arch: ModelArchitecture, lora: LoraConfig) -> AdapterPlan:
    """The adapter that the flags ask for.

    Raises:
        ConfigError: they name what the model does not have, or what can have no adapter.
    """
    assert lora.lora_rank is not None
    shape = LowRankShape(lora.lora_rank, lora.lora_alpha or float(lora.lora_rank), lora.use_rslora)
    names: dict[str, LowRankShape] = {}
    has_experts = False
    for rule, place, sources in targeted(arch, lora):
        has_experts |= rule.per_expert
        names.update({name: shape for name, own in projection_names(rule, place) if set(own) <= set(sources)})
    if has_experts and lora.use_dora:
        raise ConfigError(
            "--use-dora: no adapter of experts has lengths of rows, in PEFT neither. Leave it out, or name modules without "
            "experts with --lora-target-modules."
        )
    if lora.lora_experts == "shared" and not has_experts:
        raise ConfigError("--lora-experts shared does nothing: --lora-target-modules names no experts. Leave it out.")
    whole = frozenset((rule.megatron, place) for rule, place in modules_to_save(arch, lora))
    return AdapterPlan(names, lora.use_dora, lora.lora_experts == "shared", whole)
