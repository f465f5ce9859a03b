"""An adapter on a model that somebody else built, in their own training loop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_rmipo.config.flag_problems import refuse
from megatron_rmipo.config.flags.lora import LoraConfig, lora_problems
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.families.segments import rank_columns, rank_rows
from megatron_rmipo.families.tensors import megatron_shape, rules_of
from megatron_rmipo.model.lora.adapted import is_grouped
from megatron_rmipo.model.lora.attach import add_adapters, low_ranks
from megatron_rmipo.model.lora.bridge import has_bridge_adapters
from megatron_rmipo.model.lora.plan import AdapterPlan, plan_of_flags
from megatron_rmipo.model.lora.projections import projection_names
from megatron_rmipo.model.lora.sharded import ShardedAdapter
from megatron_rmipo.model.lora.switch import is_adapted
from megatron_rmipo.model.named_tensors import ADAPTER, named_tensors
from megatron_rmipo.model.packed_model import Chunks
from megatron_rmipo.runtime.groups import ProcessGroups

_OF_THE_TRAINER = (
    *("load_adapter", "save_adapter", "reference_adapter", "pretrained_checkpoint"),
    *("quantize_base", "lora_plus_ratio"),
)
_MOST_TOLD = 5


def add_adapter(
    model: Chunks,
    hf: str | Path | ModelArchitecture,
    lora: LoraConfig,
    *,
    seed: int = 1234,
    groups: ProcessGroups | None = None,
) -> AdapterPlan:
    """Freeze a model and give it a trained adapter that changes nothing yet. All ranks call it together, before DDP is built.

    Afterwards gradients and optimizer are the adapter's alone, :func:`megatron_rmipo.plugin.adapters_off` makes the model what it
    was, the model's own ``sharded_state_dict`` holds the adapter beside the weights, as what it is at any layout, and
    :func:`megatron_rmipo.checkpoint.adapter_source.save_adapter` writes it for PEFT.

    Args:
        model: this rank's part of a GPTModel of Megatron's own specs with its weights, not wrapped for data parallelism; attached
            or not; of an interleaved pipeline the list of its chunks.
        hf: Hugging Face directory of the model, or what was read from it: its family says which projections Megatron's matrices
            hold, and what they are called.
        lora: rank, targets and form, as the trainer's flags have them.
        seed: of A, the same on every rank.
        groups: the process groups of this rank; None: Megatron's.

    Returns:
        What the adapter changes.

    Raises:
        ConfigError: flags that cannot work, a model that has adapters, or one whose layers are not those of ``hf``.
    """
    refuse([*lora_problems(lora), *_other_flags(lora)])
    arch = hf if isinstance(hf, ModelArchitecture) else read_architecture(Path(hf))
    groups = groups or ProcessGroups.of_megatron()
    if is_adapted(model) or has_bridge_adapters(model):
        raise ConfigError("this model has adapters already; they can be trained as they are.")
    plan = plan_of_flags(arch, lora)
    faults = list(_misfits(model, arch, plan, groups))
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults[:_MOST_TOLD])
        raise ConfigError(f"this model is not the {arch.family} model that {hf} describes, so that it gets no adapter:\n{listed}")
    add_adapters(model, arch, {ADAPTER: plan}, groups, seed=seed)
    for _, layer, adapter in low_ranks(model):
        ShardedAdapter(layer, adapter, groups)
    return plan


def _other_flags(lora: LoraConfig) -> Iterator[str]:
    if lora.lora_rank is None:
        yield "lora_rank is missing"
    for name in _OF_THE_TRAINER:
        if getattr(lora, name) is not None:
            yield f"{name} is the trainer's; a loop of your own loads, saves and optimizes what it likes"


def _misfits(model: Chunks, arch: ModelArchitecture, plan: AdapterPlan, groups: ProcessGroups) -> Iterator[str]:
    """Targeted matrices that this rank's layers lack, or have in another shape, a line each."""
    rules = {rule.megatron: rule for rule in rules_of(arch)}
    found = [one for one in named_tensors(model, arch, groups) if one.known_as is not None]
    layers = {one.known_as[1].layer for one in found if one.known_as is not None} - {None}
    adapted: set[str] = set()
    for one in found:
        assert one.known_as is not None
        (megatron, place), module = one.known_as, one.module
        rule = rules[megatron]
        names = {name for name, _ in projection_names(rule, place)} & plan.projections.keys()
        if not names or rule.is_bias:
            continue
        adapted |= names
        group = groups.expert_tp if rule.per_expert else groups.tp
        rows, columns = megatron_shape(rule, arch)
        held_rows = sum(stop - start for start, stop in rank_rows(rule, rows, group.rank(), group.size()))
        held = (held_rows, len(range(*rank_columns(rule, columns, group.rank(), group.size()).indices(columns))))
        if tuple(one.tensor.shape) != held:
            yield f"{one.full_name} is {list(one.tensor.shape)} on this rank, and should be {list(held)}"
        if is_grouped(module):
            yield f"{one.full_name}: experts in one grouped layer get no adapter here; name modules of attention alone"
    for layer in sorted(number for number in layers if number is not None):
        missing = {name for name in plan.projections if f"layers.{layer}." in name} - adapted
        if missing:
            yield f"layer {layer} has no {', '.join(sorted(missing)[:3])}"
