"""A Hugging Face checkpoint, opened and checked to be that of a model."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_rmipo.checkpoint.hf.adapted import apply_adapter
from megatron_rmipo.checkpoint.hf.expected_tensors import check_keys
from megatron_rmipo.checkpoint.hf.safetensors_files import WeightFiles, row_pieces
from megatron_rmipo.checkpoint.peft.reading import is_adapter, model_directory, read_adapter
from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.registry import FAMILIES
from megatron_rmipo.families.tensors import megatron_shape, source_shapes, stored_tensors, tensors_of


def open_weights(hf_dir: Path, arch: ModelArchitecture, base: Path | None = None) -> WeightFiles:
    """Open a Hugging Face checkpoint, or an adapter of one, and check that it holds exactly the tensors of ``arch``.

    Args:
        hf_dir: the directory.
        arch: the model.
        base: the base model of an adapter; None: the directory that it names.

    Raises:
        ConversionError: weights are missing, truncated or of other shapes, a tensor is not mapped or not used, or an adapter
            cannot be merged.
    """
    files = WeightFiles(model_directory(hf_dir, base))
    _split_joined(files, arch)
    check_keys(files.tensors, arch, str(files.directory))
    for name, (_, shape) in stored_tensors(arch).items():
        files.expect(name, shape)
    if arch.tied_embeddings:
        _check_tied_head(files, arch)
    if is_adapter(hf_dir):
        apply_adapter(files, arch, read_adapter(hf_dir))
    return files


def _split_joined(files: WeightFiles, arch: ModelArchitecture) -> None:
    """Give what is stored joined the names of its parts; where those are stored, too, it is left as what nothing uses."""
    parts: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for rule, place in tensors_of(arch):
        joined = rule.joined.format(layer=place.layer) if rule.joined is not None else ""
        if joined in files:
            parts.setdefault(joined, []).extend(zip(rule.source_names(place), source_shapes(rule, arch), strict=True))
            experts = (arch.experts.num_experts,) if arch.experts is not None and rule.per_expert else ()
            shapes[joined] = (*experts, *megatron_shape(rule, arch))
    for joined, there in parts.items():
        files.expect(joined, shapes[joined])
        if not any(name in files for name, _ in there):
            files.split(joined, there)


def _check_tied_head(files: WeightFiles, arch: ModelArchitecture) -> None:
    family = FAMILIES[arch.family]
    embedding = next(rule.sources[0] for rule in family.rules if rule.megatron == family.embedding)
    for head in family.head_sources:
        if head not in files:
            continue
        stored = files.expect(head, files.tensors[embedding].shape)
        for low, high in row_pieces(stored.shape, stored.dtype):
            pair = torch.empty((2, high - low, *stored.shape[1:]), dtype=stored.dtype)
            for rows, name in zip(pair, (head, embedding), strict=True):
                files.read(name, low, rows)
            if not torch.equal(*pair):
                raise ConversionError(
                    f"{stored.path}: {head} differs from {embedding}, but config.json says tie_word_embeddings. "
                    "Set it to false, or remove the tensor."
                )
