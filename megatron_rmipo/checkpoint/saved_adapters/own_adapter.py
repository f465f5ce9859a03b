"""Adapters in checkpoints of runs here: whole factors of Hugging Face's projections, whatever layout wrote them.

Shape letters: R rows of a projection, C its columns, r the adapter's rank, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_rmipo.checkpoint.megatron.directory import ASSETS_NAME, checkpoint_path
from megatron_rmipo.checkpoint.megatron.keys import location_of
from megatron_rmipo.checkpoint.megatron.torch_dist import TorchDistReader
from megatron_rmipo.checkpoint.peft.factors import stack_experts
from megatron_rmipo.checkpoint.peft.forms import PEFT_NAMES
from megatron_rmipo.checkpoint.saved_adapters.saved_adapter import SavedAdapter
from megatron_rmipo.errors import CheckpointError, ConversionError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Layout, Place, Rule
from megatron_rmipo.families.tensors import megatron_shape, rules_of, source_shapes, tensors_of
from megatron_rmipo.model.lora.plan import AdapterPlan
from megatron_rmipo.model.lora.projections import FactorKind, adapter_key, factor_name, part_of, projection_names


def plan_of_record(record: Mapping[str, Any], where: Path) -> AdapterPlan:
    """What a checkpoint says that its adapter changes.

    Args:
        record: what it says of the adapter.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: that cannot be read.
    """
    try:
        return AdapterPlan.of_record(record["plan"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: what it says of its adapter cannot be read ({error!r}). Name another checkpoint."
        ) from error


def base_of_record(record: Mapping[str, Any]) -> Path:
    """The directory of the base model's config, as the run knew it; PEFT's config of the adapter names it."""
    base, iteration = Path(record["base"]), record["base_iteration"]
    return base if iteration is None else checkpoint_path(base, iteration) / ASSETS_NAME


def read_own_adapter(reader: TorchDistReader, plan: AdapterPlan, arch: ModelArchitecture) -> SavedAdapter:
    """The adapter of a checkpoint.

    Args:
        reader: of the checkpoint.
        plan: what its record says of the adapter.
        arch: its base model.

    Raises:
        CheckpointError: a file is damaged.
        ConversionError: a tensor of the plan is missing, or of another model.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    for rule, place in tensors_of(arch):
        for name, sources in projection_names(rule, place):
            # Of experts the first stands for all of the layer.
            if name in plan.projections and name not in factors and not rule.is_bias:
                factors[name] = dict(_factors(reader, plan, arch, rule, place, name, sources))
    if missing := sorted(plan.projections.keys() - factors.keys()):
        raise ConversionError(_of_another_model(reader, f"the model has no {missing[0]}"))
    rules = {rule.megatron: rule for rule in rules_of(arch)}
    whole = {}
    for megatron, place in sorted(plan.trained_whole):
        (name,) = rules[megatron].source_names(place)
        whole[name] = _whole(reader, rules[megatron], place, arch)
    return SavedAdapter(plan, factors, whole)


def _factors(
    reader: TorchDistReader,
    plan: AdapterPlan,
    arch: ModelArchitecture,
    rule: Rule,
    place: Place,
    name: str,
    sources: tuple[int, ...],
) -> Iterator[tuple[str, Tensor]]:
    """A projection's tensors by PEFT's names."""
    shapes, rank = source_shapes(rule, arch), plan.projections[name].rank
    num_rows, num_columns = sum(shapes[source][0] for source in sources), shapes[sources[0]][1]
    expected: dict[FactorKind, tuple[int, ...]] = {"A": (rank, num_columns), "B": (num_rows, rank)}
    if plan.use_dora:
        expected["magnitude"] = (num_rows,)
    num_experts = arch.experts.num_experts if rule.per_expert and arch.experts is not None else None
    experts = () if num_experts is None or plan.shares_experts else (num_experts,)
    found: dict[FactorKind, list[Tensor]] = {}
    for kind, shape in expected.items():
        key = adapter_key(rule.megatron, place) + factor_name(part_of(rule, place, sources), kind)
        _check(reader, key, (*experts, *shape))
        found[kind] = [reader.read_rows(key, at, 0, shape[0]) for at in ([(e,) for e in range(*experts)] if experts else [()])]
    if num_experts is None:
        yield from ((PEFT_NAMES[kind], tensor) for kind, (tensor,) in found.items())
        return
    # An adapter that experts share is each one's.
    times = num_experts if plan.shares_experts else 1
    a, b = stack_experts(list(zip(found["A"] * times, found["B"] * times, strict=True)))
    yield from ((PEFT_NAMES["A"], a), (PEFT_NAMES["B"], b))


def _whole(reader: TorchDistReader, rule: Rule, place: Place, arch: ModelArchitecture) -> Tensor:
    forms = [location_of(rule.megatron, place, arch, apart=apart) for apart in (True, False)]
    location = next((form for form in forms if form.key in reader.tensors), forms[-1])
    shape = megatron_shape(rule, arch)
    # A vocabulary may be padded.
    _check(
        reader, location.key, (*location.sizes, *shape), grows=len(location.sizes) if rule.layout is Layout.VOCABULARY else None
    )
    return reader.read_rows(location.key, location.at, 0, shape[0])


def _check(reader: TorchDistReader, key: str, expected: tuple[int, ...], grows: int | None = None) -> None:
    """Refuse a tensor that is missing, or of another shape; along the dimension ``grows`` it may be longer."""
    if key not in reader.tensors:
        raise ConversionError(_of_another_model(reader, f"{key} is missing"))
    stored = reader.shape(key)
    if grows is not None and len(stored) == len(expected):
        stored = (*stored[:grows], min(stored[grows], expected[grows]), *stored[grows + 1 :])
    if stored != expected:
        raise ConversionError(_of_another_model(reader, f"{key} is {list(stored)}, and should be {list(expected)}"))


def _of_another_model(reader: TorchDistReader, fault: str) -> str:
    return (
        f"{reader.directory} does not hold the adapter that its record describes: {fault}. Its base model's config.json is read "
        "from the checkpoint, or from --hf-assets DIR: leave that out, or name the right one."
    )
