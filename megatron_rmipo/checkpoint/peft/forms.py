"""Between what PEFT's config says of an adapter and what the adapter changes of a model here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from megatron_rmipo.checkpoint.peft.reading import CONFIG_NAME, Adapter
from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.adapters import EXPERT_PARAMETERS, AdapterForm
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Layout
from megatron_rmipo.families.parameter_names import TensorId
from megatron_rmipo.families.targets import is_linear
from megatron_rmipo.families.tensors import source_shapes, tensors_of
from megatron_rmipo.model.lora.plan import AdapterPlan
from megatron_rmipo.model.lora.projections import FactorKind, LowRankShape, projection_names

# What PEFT calls the tensors of a projection's adapter.
PEFT_NAMES: Mapping[FactorKind, str] = {"A": "lora_A", "B": "lora_B", "magnitude": "lora_magnitude_vector"}
_OF_EACH_EXPERT = re.compile(r".*\.experts\.\d+\.\w+")


def plan_of_adapter(adapter: Adapter, arch: ModelArchitecture) -> AdapterPlan:
    """What an adapter that was read changes of a model.

    Raises:
        ConversionError: it is not of this model, or of a form that is not trained here.
    """
    known = _projections(arch)
    for name, factors in adapter.factors.items():
        if _OF_EACH_EXPERT.fullmatch(name) and name not in known:
            raise ConversionError(
                f"{adapter.path}: {name} is an adapter of one expert's module, as older versions of transformers have them. Load "
                "it with PEFT on the model and save it again; then it is of all experts' parameters."
            )
        if name not in known or factors.shape != known[name]:
            there = f"its weight is {list(known[name])}" if name in known else "there is no such linear layer"
            raise ConversionError(
                f"{adapter.path}: {name} has factors of a weight {list(factors.shape)}, but in this model {there}. It is an "
                "adapter of another model."
            )
    shapes = {
        name: LowRankShape(factors.rank, factors.alpha, adapter.form.use_rslora) for name, factors in adapter.factors.items()
    }
    if adapter.form.bias != "none":
        raise ConversionError(
            f"{adapter.path.parent / CONFIG_NAME}: bias is {adapter.form.bias!r}; biases stay as they are here."
        )
    return AdapterPlan(shapes, adapter.form.use_dora, trained_whole=frozenset(_whole(adapter, arch)))


def form_of_plan(plan: AdapterPlan, arch: ModelArchitecture, base: str) -> AdapterForm:
    """What PEFT's config says of an adapter.

    Args:
        plan: the adapter.
        arch: the model.
        base: the directory of the model.
    """
    shapes = plan.projections
    rank, alpha = (
        Counter(values).most_common(1)[0][0] for values in zip(*((s.rank, s.alpha) for s in shapes.values()), strict=True)
    )
    known = _projections(arch)
    parameters = {name: parameter for name in shapes if (parameter := _as_parameter(name, plan, arch)) is not None}
    said = {name: parameters.get(name, name) for name in shapes}
    return AdapterForm(
        rank=rank,
        alpha=int(alpha) if alpha == int(alpha) else alpha,
        rank_pattern={re.escape(said[name]): shape.rank for name, shape in shapes.items() if shape.rank != rank},
        alpha_pattern={re.escape(said[name]): shape.alpha for name, shape in shapes.items() if shape.alpha != alpha},
        use_rslora=any(shape.is_stabilized for shape in shapes.values()),
        use_dora=plan.use_dora,
        target_modules=_shortest([name for name in shapes if name not in parameters], known, 1),
        target_parameters=_shortest(
            list(parameters.values()), {parameter for name in known if (parameter := _as_parameter(name, plan, arch))}, 2
        ),
        modules_to_save=tuple(_module(name) for name in _whole_names(plan, arch)),
        base_model_name_or_path=base,
    )


def _as_parameter(name: str, plan: AdapterPlan, arch: ModelArchitecture) -> str | None:
    """What ``target_parameters`` calls a projection; None for what is named as a module.

    PEFT takes names of modules in MLPs of sparse models for those of experts, whichever they are. Its DoRA is of modules alone.
    """
    if arch.experts is None or ".self_attn." in name or plan.use_dora:
        return None
    return name if name.endswith(tuple(f".experts.{parameter}" for parameter in EXPERT_PARAMETERS)) else f"{name}.weight"


def _projections(arch: ModelArchitecture) -> dict[str, tuple[int, int]]:
    """The linear layers of a model by Hugging Face name, with their shapes; experts of a layer as one, with that of each."""
    found: dict[str, tuple[int, int]] = {}
    for rule, place in tensors_of(arch):
        if is_linear(rule, arch) and not rule.is_stacked:
            shapes = source_shapes(rule, arch)
            for name, sources in projection_names(rule, place):
                found[name] = (sum(shapes[source][0] for source in sources), shapes[0][1])
    return found


def _shortest(names: list[str], known: Iterable[str], num_parts: int) -> tuple[str, ...]:
    """Ends of names that mean these and no others, of so many parts; where there are none, the names."""
    ends = dict.fromkeys(".".join(name.split(".")[-num_parts:]) for name in names)
    meant = {name for name in known if any(name.endswith("." + end) for end in ends)}
    return tuple(ends) if meant == set(names) else tuple(names)


def _whole(adapter: Adapter, arch: ModelArchitecture) -> Iterable[TensorId]:
    sources = {source: (rule, place) for rule, place in tensors_of(arch) for source in rule.source_names(place)}
    for name in adapter.whole:
        if name not in sources:
            raise ConversionError(f"{adapter.path}: {name} was trained whole, and this model has no such tensor.")
        rule, place = sources[name]
        if len(rule.sources) != 1 or rule.is_stacked:
            raise ConversionError(f"{adapter.path}: {name} was trained whole and is a part of a matrix here; that is not built.")
        if arch.tied_embeddings and rule.layout is Layout.VOCABULARY:
            raise ConversionError(f"{adapter.path}: {name} was trained whole, and in this model it is tied; that is not built.")
        yield rule.megatron, place


def _whole_names(plan: AdapterPlan, arch: ModelArchitecture) -> list[str]:
    """Hugging Face names of the tensors that are trained whole."""
    return [
        name
        for rule, place in tensors_of(arch)
        if (rule.megatron, place) in plan.trained_whole
        for name in rule.source_names(place)
    ]


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]
