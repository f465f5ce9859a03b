"""The adapters that a model of a run has: what they change, and where their values come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rmipo.config.flags.lora import LoraConfig
from megatron_rmipo.config.unknown_flags import flag_of
from megatron_rmipo.errors import CheckpointError, ConfigError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.model.lora.attach import add_adapters
from megatron_rmipo.model.lora.plan import AdapterPlan, plan_of_flags
from megatron_rmipo.model.lora.quantized import QuantizedKind
from megatron_rmipo.model.lora.quantized_base import quantize_base
from megatron_rmipo.model.named_tensors import ADAPTER
from megatron_rmipo.model.policy import Policy
from megatron_rmipo.runtime.groups import ProcessGroups


@dataclasses.dataclass(frozen=True)
class AdapterSource:
    """The adapters of a model.

    Attributes:
        plans: name -> what it changes.
        directories: name -> PEFT adapter that holds its values; of others A is drawn.
    """

    plans: Mapping[str, AdapterPlan]
    directories: Mapping[str, Path] = dataclasses.field(default_factory=dict)

    @property
    def plan(self) -> AdapterPlan:
        """Of the one that is trained."""
        return self.plans[ADAPTER]

    def add_to(
        self,
        policy: Policy,
        arch: ModelArchitecture,
        groups: ProcessGroups,
        *,
        seed: int,
        quantize_as: QuantizedKind | None = None,
    ) -> None:
        """Freeze a model that has its weights, and give it the adapters with their values. All ranks call it together.

        Args:
            policy: this rank's part of the model.
            arch: what it is.
            groups: the process groups of this rank.
            seed: of A.
            quantize_as: how the frozen linear layers' weights are kept from now on; None: as they are.
        """
        add_adapters(policy, arch, self.plans, groups, seed=seed)
        if quantize_as is not None:
            quantize_base(policy, quantize_as)


def adapters_of_flags(arch: ModelArchitecture, lora: LoraConfig) -> AdapterSource:
    """The adapters that a new run's flags ask for.

    Raises:
        ConfigError: as :func:`megatron_rmipo.model.lora.plan.plan_of_flags`.
    """
    return AdapterSource({ADAPTER: plan_of_flags(arch, lora)})


def adapters_of_record(arch: ModelArchitecture, record: Mapping[str, Any], lora: LoraConfig, where: Path) -> AdapterSource:
    """The adapters of a model whose trained one a checkpoint holds.

    Args:
        arch: the model.
        record: what the checkpoint says of the adapter.
        lora: the flags; where they say what the adapter is, they have to say the same.
        where: the checkpoint, for messages.

    Raises:
        ConfigError: they say something else.
        CheckpointError: the record cannot be read.
    """
    try:
        plan = AdapterPlan.of_record(record["plan"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: what it says of its adapter cannot be read ({error!r}). Name another checkpoint."
        ) from error
    if lora.is_on:
        _refuse_other_form(plan, adapters_of_flags(arch, lora).plan, where)
    return AdapterSource({ADAPTER: plan})


def _refuse_other_form(saved: AdapterPlan, asked: AdapterPlan, where: Path) -> None:
    if saved == asked:
        return
    changed = {
        "--lora-rank, --lora-alpha, --use-rslora": {*saved.projections.values()} != {*asked.projections.values()},
        "--lora-target-modules, --lora-target-regex": saved.projections.keys() != asked.projections.keys(),
        flag_of("use_dora"): saved.use_dora != asked.use_dora,
        flag_of("lora_experts"): saved.shares_experts != asked.shares_experts,
        flag_of("lora_modules_to_save"): saved.trained_whole != asked.trained_whole,
    }
    names = [name for name, differs in changed.items() if differs]
    raise ConfigError(
        f"--load {where.parent}: its adapter is another than the flags say ({'; '.join(names)}). Give them as they "
        "were, or start anew from --load-adapter."
    )
