"""Adapters in checkpoints of Megatron-Bridge: ``torch_dist`` files of LoRA, CanonicalLoRA or DoRA alone, written at any layout.

Read in Megatron-Bridge 0.6.2 (``megatron/bridge/peft/{lora,canonical_lora,dora,utils}.py``) and seen in checkpoints that it
wrote. However ranks held them, the files have A as ``[r, C]`` and B as ``[R, r]``, its rows in the order of Megatron's matrix; of
experts one of each, all alike where the run shared them. ``run_config.yaml`` says alpha, and how many ranks wrote them.

Shape letters: R rows of a Megatron matrix, C its columns, r the adapter's rank, tp the ranks that cut it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from torch import Tensor

from megatron_rmipo.checkpoint.megatron.keys import Location, location_of
from megatron_rmipo.checkpoint.megatron.torch_dist import TorchDistReader
from megatron_rmipo.checkpoint.peft.factors import stack_experts
from megatron_rmipo.checkpoint.saved_adapters.saved_adapter import SavedAdapter
from megatron_rmipo.errors import CheckpointError, ConversionError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Layout, Place, Rule
from megatron_rmipo.families.segments import segments_of
from megatron_rmipo.families.targets import is_linear
from megatron_rmipo.families.tensors import megatron_shape, rules_of, source_shapes, tensors_of
from megatron_rmipo.model.lora.plan import AdapterPlan
from megatron_rmipo.model.lora.projections import LowRankShape, projection_names

RUN_CONFIG = "run_config.yaml"
_ADAPTER = ".adapter."
_OF_MODEL = ("embedding.", "decoder.", "output_layer.", "mtp.")
_KINDS = ("LoRA", "VLMLoRA", "CanonicalLoRA", "DoRA")
# The parts of a matrix of several, in its order, where each has an adapter of its own.
_PARTS = {Layout.QKV: ("adapter_q", "adapter_k", "adapter_v"), Layout.GATE_UP: ("adapter_gate", "adapter_up")}
_IN, _OUT, _LENGTHS = "linear_in.weight", "linear_out.weight", "weight_magnitude"


@dataclasses.dataclass(frozen=True)
class _Run:
    """What a run says of its adapter: kind, alpha, and the sizes of tensor and expert tensor parallelism it was saved with."""

    kind: str
    alpha: float
    tp_size: int
    expert_tp_size: int


@dataclasses.dataclass(frozen=True)
class _Part:
    """The low-rank product of some rows of a Megatron matrix, which ``rows`` int64 numbers as its sources have them."""

    rows: Tensor
    a: Tensor
    b: Tensor
    lengths: Tensor | None = None

    def is_in(self, low: int, high: int) -> Tensor:
        """bool: which of the rows are in ``[low, high)``."""
        return (self.rows >= low) & (self.rows < high)


def holds_bridge_adapter(reader: TorchDistReader) -> bool:
    """Whether a checkpoint holds adapters of Megatron-Bridge, and no model."""
    return all(_ADAPTER in key for key in _of_model(reader)) and any(key.endswith((_IN, _OUT)) for key in _of_model(reader))


def read_bridge_adapter(reader: TorchDistReader, arch: ModelArchitecture) -> SavedAdapter:
    """The adapter of a checkpoint, un-merged to one of each projection.

    What Megatron-Bridge put in another order at several ranks is put right, by the number of ranks in its ``run_config.yaml``.

    Args:
        reader: of a checkpoint that :func:`holds_bridge_adapter`.
        arch: its base model.

    Raises:
        CheckpointError: ``run_config.yaml`` is missing, or does not say what is needed; or files are damaged.
        ConversionError: it is not this model's, or changes what no Hugging Face adapter can.
    """
    run, used = _read_run(reader.directory), set[str]()
    found: dict[str, list[tuple[Tensor, Tensor, Tensor | None]]] = {}
    shapes: dict[str, LowRankShape] = {}
    for rule, place in tensors_of(arch):
        if not is_linear(rule, arch) or rule.is_stacked:
            continue
        parts = list(_parts(reader, rule, place, arch, run, used))
        if run.kind == "DoRA" and parts:
            _refuse_lengths(rule, arch, reader.directory)
        starts = _first_rows(rule, arch)
        for name, sources in projection_names(rule, place):
            low, high = starts[sources[0]], starts[sources[-1] + 1]
            inside = [part for part in parts if bool(part.is_in(low, high).any())]
            if inside:
                found.setdefault(name, []).append(_joined(inside, low, high))
                # Products side by side are one of as many times the rank, and keep their scale.
                shapes[name] = LowRankShape(sum(part.a.shape[0] for part in inside), run.alpha * len(inside))
    _refuse_unused(reader, used)
    return SavedAdapter(
        AdapterPlan(shapes, use_dora=run.kind == "DoRA"), {name: _named(experts) for name, experts in found.items()}
    )


def _read_run(directory: Path) -> _Run:
    path = directory / RUN_CONFIG
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        peft, model = content["peft"], content["model"]
        kind, tp_size = str(peft["_target_"]).rpartition(".")[2], int(model["tensor_model_parallel_size"])
        run = _Run(kind, float(peft["alpha"]), tp_size, int(model.get("expert_tensor_parallel_size") or tp_size))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read for the adapter's alpha and the ranks that wrote it ({error!r}). Each checkpoint of "
            "Megatron-Bridge holds one: copy the checkpoint whole."
        ) from error
    if kind not in _KINDS:
        raise ConversionError(f"{path}: the adapter is a {kind}; {', '.join(_KINDS)} are known.")
    if kind == "DoRA" and max(run.tp_size, run.expert_tp_size) > 1:
        raise ConversionError(
            f"{path}: the adapter is a DoRA that was trained at tensor-parallel size {run.tp_size}, where Megatron-Bridge takes "
            "lengths of rows from each rank's own columns: ranks computed different things, and no one adapter is that."
        )
    return run


def _parts(
    reader: TorchDistReader, rule: Rule, place: Place, arch: ModelArchitecture, run: _Run, used: set[str]
) -> Iterator[_Part]:
    """The low-rank products of a matrix: none, one of all of it, or one of each of its parts."""
    module = rule.megatron.removesuffix("weight") + "adapter"
    num_rows, num_columns = megatron_shape(rule, arch)
    if _locate(reader, f"{module}.{_OUT}", place, arch):
        a, b = (_read(reader, f"{module}.{name}", place, arch, used) for name in (_IN, _OUT))
        lengths = _read(reader, f"{module}.{_LENGTHS}", place, arch, used) if run.kind == "DoRA" else None
        part = _Part(_source_rows(rule, arch), a, b, lengths)
        _check(part, (num_rows, num_columns), module, reader.directory)
        yield part
        return
    start = 0
    for name, size in zip(_PARTS.get(rule.layout, ()), _part_rows(rule, arch), strict=False):
        if _locate(reader, f"{module}.{name}.{_OUT}", place, arch):
            a, b = (_read(reader, f"{module}.{name}.{end}", place, arch, used) for end in (_IN, _OUT))
            part = _Part(torch.arange(start, start + size), a, b)
            _check(part, (size, num_columns), f"{module}.{name}", reader.directory)
            tp_size = run.expert_tp_size if rule.per_expert else run.tp_size
            yield dataclasses.replace(part, b=_halves_put_right(b, tp_size)) if rule.layout is Layout.GATE_UP else part
        start += size


def _halves_put_right(b: Tensor, tp_size: int) -> Tensor:
    """``[R, r]``: rows in order, of those of an ``adapter_gate`` or ``adapter_up`` as a checkpoint has them.

    Megatron-Bridge takes each for a matrix of gate and up: all ranks' first halves stand before all ranks' second halves.
    """
    if tp_size == 1:
        return b
    return b.reshape(2, tp_size, -1, b.shape[1]).transpose(0, 1).reshape(b.shape)


def _source_rows(rule: Rule, arch: ModelArchitecture) -> Tensor:
    """int64 ``[R]``: of each Megatron row its number among the rows of all sources, one below the other."""
    starts = _first_rows(rule, arch)
    runs = [torch.arange(segment.rows) + starts[segment.source] + segment.start for segment in segments_of(rule, arch)]
    return torch.cat(runs)


def _first_rows(rule: Rule, arch: ModelArchitecture) -> list[int]:
    starts = [0]
    for shape in source_shapes(rule, arch):
        starts.append(starts[-1] + shape[0])
    return starts


def _part_rows(rule: Rule, arch: ModelArchitecture) -> tuple[int, ...]:
    """Rows of the parts of a matrix of several, in its order."""
    if rule.layout is Layout.QKV:
        return arch.query_size, arch.key_size, arch.key_size
    half = megatron_shape(rule, arch)[0] // 2
    return half, half


def _joined(parts: list[_Part], low: int, high: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """A, B and lengths of the rows ``[low, high)`` of the sources: products side by side where there are several."""
    a = torch.cat([part.a for part in parts])
    b, column = a.new_zeros(high - low, a.shape[0]), 0
    lengths = None
    for part in parts:
        own = part.is_in(low, high)
        b[part.rows[own] - low, column : column + part.a.shape[0]] = part.b[own]
        column += part.a.shape[0]
        if part.lengths is not None:
            lengths = a.new_empty(high - low)
            lengths[part.rows[own] - low] = part.lengths[own]
    return a, b, lengths


def _named(experts: list[tuple[Tensor, Tensor, Tensor | None]]) -> dict[str, Tensor]:
    """The tensors of a projection by PEFT's names; those of all experts of a layer in one."""
    a, b, lengths = experts[0]
    if len(experts) > 1:
        a, b = stack_experts([(a, b) for a, b, _ in experts])
    return {"lora_A": a, "lora_B": b} | ({} if lengths is None else {"lora_magnitude_vector": lengths})


def _locate(reader: TorchDistReader, name: str, place: Place, arch: ModelArchitecture) -> Location | None:
    """Where a tensor of an adapter lies: in an entry of all layers, or of one; of all experts, or one that they share."""
    for expert in {place.expert, None}:
        for apart in (True, False):
            location = location_of(name, Place(place.layer, expert), arch, apart=apart)
            if location.key in reader.tensors and reader.shape(location.key)[: len(location.sizes)] == location.sizes:
                depth = 1 if name.endswith(_LENGTHS) else 2
                if len(reader.shape(location.key)) == len(location.sizes) + depth:
                    return location
    return None


def _read(reader: TorchDistReader, name: str, place: Place, arch: ModelArchitecture, used: set[str]) -> Tensor:
    location = _locate(reader, name, place, arch)
    if location is None:
        raise ConversionError(f"{reader.directory}: {name} is missing, or of another model than config.json describes.")
    used.add(location.key)
    rows = reader.shape(location.key)[len(location.sizes)]
    return reader.read_rows(location.key, location.at, 0, rows).to(torch.float32)


def _check(part: _Part, shape: tuple[int, int], module: str, directory: Path) -> None:
    """Refuse factors of another shape than the weight's."""
    if (part.b.shape[0], part.a.shape[1]) != shape or part.a.shape[0] != part.b.shape[1]:
        raise ConversionError(
            f"{directory}: {module} has factors {list(part.a.shape)} and {list(part.b.shape)}, but config.json makes its weight "
            f"{list(shape)}. Name the base model's directory with --hf-assets."
        )


def _refuse_lengths(rule: Rule, arch: ModelArchitecture, directory: Path) -> None:
    """Refuse DoRA where PEFT computes something else: it has no lengths of experts' rows, and scales no bias with the rows."""
    if rule.per_expert:
        raise ConversionError(f"{directory}: PEFT has no DoRA of experts, which this adapter changes. Train LoRA instead.")
    bias = rule.megatron.removesuffix("weight") + "bias"
    if any(other.megatron == bias for other in rules_of(arch)):
        raise ConversionError(
            f"{directory}: with its DoRA Megatron-Bridge scales {bias}, too, as no Hugging Face adapter does. Train LoRA instead."
        )


def _refuse_unused(reader: TorchDistReader, used: set[str]) -> None:
    unused = [key for key in _of_model(reader) if key not in used]
    if unused:
        shown = "\n".join(f"  {key} {list(reader.shape(key))}" for key in unused[:8])
        raise ConversionError(
            f"{reader.directory} holds adapters of what no adapter of the Hugging Face model can change, or of another model "
            f"than config.json describes:\n{shown}"
        )


def _of_model(reader: TorchDistReader) -> list[str]:
    return [key for key in reader.tensors if key.startswith(_OF_MODEL)]
