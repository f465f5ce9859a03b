"""Weights as an adapter makes them: its names of modules, which are transformers', found among the tensors of a checkpoint."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch

from megatron_rmipo.checkpoint.hf.safetensors_files import StoredTensor, WeightFiles, read_header
from megatron_rmipo.checkpoint.peft.reading import Adapter
from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Layout, Rule
from megatron_rmipo.families.registry import FAMILIES
from megatron_rmipo.families.tensors import stored_shapes, tensors_of


class _Part(NamedTuple):
    """A tensor of the checkpoint, all of what an adapter names or a run of its rows, of one expert where it names all experts'.

    A stack of all experts' matrices, which is what the adapter names, is no expert's.
    """

    name: str
    shape: tuple[int, ...]
    rule: Rule
    expert: int | None


def apply_adapter(files: WeightFiles, arch: ModelArchitecture, adapter: Adapter) -> None:
    """Read a model's weights from now on as an adapter makes them.

    Args:
        files: of the base model, which were checked.
        arch: the base model.
        adapter: its adapter.

    Raises:
        ConversionError: it changes what the model does not have, or tensors of other shapes, or unties embeddings.
    """
    parts = _parts_by_name(arch)
    for name, factors in adapter.factors.items():
        weight = name if factors.num_experts is not None else f"{name}.weight"
        there = parts.get(weight, [])
        held = _shape_for_adapter(there)
        shape = factors.shape if factors.num_experts is None else (factors.num_experts, *factors.shape)
        _refuse_other_shape(files, adapter, weight, shape, held)
        rows: dict[int | None, int] = {}
        for part in there:
            own = factors if part.expert is None or factors.num_experts is None else factors.of_expert(part.expert)
            if part.rule.per_expert or part.rule.layout is Layout.EXPERTS:
                # No linear layers in transformers, whoever trained them as such.
                own = dataclasses.replace(own, is_rounded=True)
            files.change(part.name, own, rows.get(part.expert, 0))
            rows[part.expert] = rows.get(part.expert, 0) + part.shape[0]
    _take_whole(files, arch, adapter, parts)


def _parts_by_name(arch: ModelArchitecture) -> dict[str, list[_Part]]:
    """Every tensor by what it is called in a checkpoint, and parts of what transformers holds in one by the name of that."""
    parts: dict[str, list[_Part]] = {}
    for rule, place in tensors_of(arch):
        joined = rule.joined.format(layer=place.layer) if rule.joined is not None else None
        for name, shape in zip(rule.source_names(place), stored_shapes(rule, arch), strict=True):
            parts[name] = [_Part(name, shape, rule, None)]
            if joined is not None:
                parts.setdefault(joined, []).append(_Part(name, shape, rule, place.expert))
    return parts


def _shape_for_adapter(parts: list[_Part]) -> tuple[int, ...] | None:
    """The shape of what these parts make up, ``[R, C]``, ``[E, R, C]`` of experts, or of a vector; None of none."""
    if not parts:
        return None
    first = parts[0]
    if first.rule.is_stacked and len(first.shape) == 3:
        return (first.shape[0], *reversed(first.shape[1:]))
    experts = {part.expert for part in parts}
    own = (sum(part.shape[0] for part in parts) // len(experts), *first.shape[1:])
    return own if experts == {None} else (len(experts), *own)


def _take_whole(files: WeightFiles, arch: ModelArchitecture, adapter: Adapter, parts: dict[str, list[_Part]]) -> None:
    saved = read_header(adapter.path)
    whole = {name: saved[in_file] for name, in_file in adapter.whole.items()}
    if arch.tied_embeddings:
        _take_tied_head(whole, arch, adapter)
    for name, stored in whole.items():
        there = parts.get(name, [])
        held = (sum(part.shape[0] for part in there), *there[0].shape[1:]) if there else None
        _refuse_other_shape(files, adapter, name, stored.shape, held)
        position = stored.position
        for part in there:
            files.replace(part.name, StoredTensor(stored.path, position, part.shape, stored.dtype, is_part=True))
            position += math.prod(part.shape) * stored.dtype.itemsize


def _take_tied_head(whole: dict[str, StoredTensor], arch: ModelArchitecture, adapter: Adapter) -> None:
    """Leave out the head of a model whose embeddings are tied and remain so."""
    family = FAMILIES[arch.family]
    embedding = next(rule.sources[0] for rule in family.rules if rule.megatron == family.embedding)
    tied = [name for name in (embedding, *family.head_sources) if name in whole]
    if not tied:
        return
    tensors = adapter.read_whole()
    alike = all(torch.equal(tensors[name], tensors[tied[0]]) for name in tied)
    if not (alike and tied[0] == embedding and adapter.form.ensure_weight_tying):
        raise ConversionError(
            f"{adapter.path}: it holds {' and '.join(tied)} whole and unties them, for want of ensure_weight_tying, while the "
            "base model's embeddings are tied. Merge it with PEFT (merge_and_unload) and save the model."
        )
    for head in tied[1:]:
        del whole[head]


def _refuse_other_shape(
    files: WeightFiles, adapter: Adapter, name: str, shape: tuple[int, ...], held: tuple[int, ...] | None
) -> None:
    if shape != held:
        found = f"has shape {list(held)}" if held is not None else "is none of its tensors"
        if held is not None and len(held) == 3 and shape == (held[0], held[2], held[1]):
            raise ConversionError(
                f"{adapter.path}: the factors of {name} are of transposed weights {list(shape)}, as PEFT wrote those of experts "
                f"before 0.19.1; the model's are {list(held)}. Merge it with that version (merge_and_unload) and save the model."
            )
        raise ConversionError(
            f"{adapter.path}: it changes {name} {list(shape)}, which {found} in the model in {files.directory}. Name the model "
            "that it was trained on with --base-hf DIR; what else it holds (tied embeddings apart, for one) merge with PEFT."
        )
