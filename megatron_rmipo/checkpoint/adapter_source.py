"""The adapters that a model of a run has: what they change, and where their values come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_rmipo.checkpoint.peft.forms import form_of_plan, plan_of_adapter
from megatron_rmipo.checkpoint.peft.reading import Adapter, read_adapter
from megatron_rmipo.checkpoint.peft.values import gather_values, load_values
from megatron_rmipo.checkpoint.peft.writing import write_adapter
from megatron_rmipo.checkpoint.saved_adapters.own_adapter import plan_of_record
from megatron_rmipo.config.flag_problems import refuse
from megatron_rmipo.config.flags.lora import LoraConfig, lora_problems
from megatron_rmipo.config.schema import Config
from megatron_rmipo.config.unknown_flags import flag_of
from megatron_rmipo.errors import ConfigError, ConversionError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.model.lora.attach import add_adapters
from megatron_rmipo.model.lora.plan import AdapterPlan, plan_of_flags
from megatron_rmipo.model.lora.quantized import QuantizedKind
from megatron_rmipo.model.lora.quantized_base import quantize_base
from megatron_rmipo.model.named_tensors import ADAPTER, REFERENCE_ADAPTER
from megatron_rmipo.model.packed_model import Chunks
from megatron_rmipo.model.policy import Policy
from megatron_rmipo.runtime.agreement import on_first_rank
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
        policy: Chunks,
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
        for name, directory in self.directories.items():
            load_values(policy, read_adapter(directory), self.plans[name], arch, groups, name)


def adapters_of_flags(arch: ModelArchitecture, lora: LoraConfig) -> AdapterSource:
    """The adapters that a new run's flags ask for.

    Raises:
        ConfigError: as :func:`megatron_rmipo.model.lora.plan.plan_of_flags`.
        ConversionError: an adapter that they name is of another model, or cannot be read.
    """
    plans, directories = {}, {}
    for name, named in ((ADAPTER, lora.load_adapter), (REFERENCE_ADAPTER, lora.reference_adapter)):
        if named is not None:
            directories[name] = Path(named)
            flag = flag_of("load_adapter" if name == ADAPTER else "reference_adapter")
            plans[name] = plan_of_adapter(_read_named(flag, Path(named)), arch)
    if ADAPTER not in plans:
        plans[ADAPTER] = plan_of_flags(arch, lora)
    return AdapterSource(plans, directories)


def _read_named(flag: str, directory: Path) -> Adapter:
    try:
        return read_adapter(directory)
    except ConversionError as error:
        raise ConversionError(f"{flag}: {error}") from error


def with_adapter_said(config: Config) -> Config:
    """The flags with what the adapter in ``--load-adapter`` says of itself: estimates and costs go by them. No communication.

    Raises:
        ConfigError: they say some of that themselves.
        ConversionError: the adapter cannot be read.
    """
    lora = config.lora
    if lora.load_adapter is None:
        return config
    refuse(list(lora_problems(lora)))
    adapter = _read_named("--load-adapter", Path(lora.load_adapter))
    said = lora.filled_in(
        # The widest, where they differ.
        lora_rank=max(factors.rank for factors in adapter.factors.values()),
        lora_alpha=float(adapter.form.alpha),
        lora_target_modules=list(adapter.factors),
        use_rslora=adapter.form.use_rslora,
        use_dora=adapter.form.use_dora,
        lora_modules_to_save=sorted({name.rpartition(".")[0] for name in adapter.whole}) or None,
    )
    return dataclasses.replace(config, lora=said)


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
    plan = plan_of_record(record, where)
    if not lora.is_on:
        return AdapterSource({ADAPTER: plan})
    asked = adapters_of_flags(arch, lora)
    _refuse_other_form(plan, asked.plan, where)
    # The checkpoint holds the values of the one that is trained.
    directories = {name: directory for name, directory in asked.directories.items() if name != ADAPTER}
    return AdapterSource({**asked.plans, ADAPTER: plan}, directories)


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


def save_adapter(
    policy: Policy,
    source: AdapterSource,
    arch: ModelArchitecture,
    base: Path,
    save_dir: Path,
    groups: ProcessGroups,
    card: Callable[[], str | None],
) -> None:
    """Write the trained adapter as PEFT has it. All ranks call it together; the first one writes.

    Args:
        policy: this rank's part of the adapted model.
        source: its adapters.
        arch: the model.
        base: directory of the frozen model, which the adapter's config names.
        save_dir: missing or empty.
        groups: the process groups of this rank.
        card: on the first rank: the text of its model card.

    Raises:
        ConversionError: on every rank: it cannot be written.
    """
    values = gather_values(policy, source.plan, arch, groups)

    def write() -> None:
        assert values is not None
        write_adapter(save_dir, form_of_plan(source.plan, arch, str(base)), values.factors, values.whole, card=card())

    on_first_rank(groups.world, write)
