"""Hugging Face checkpoints into a Megatron model and out of it, one tensor group at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from megatron_rmipo.checkpoint.hf.checked_weights import open_weights
from megatron_rmipo.checkpoint.hf.gathering import GatheredTensors, sharing_group
from megatron_rmipo.checkpoint.hf.mappings import TensorId, canonical_names
from megatron_rmipo.checkpoint.hf.shards import fill_shard, rank_shape
from megatron_rmipo.checkpoint.hf.writer import DEFAULT_SHARD_BYTES, dtype_to_store, write_hf_directory
from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Layout, Place, Rule
from megatron_rmipo.families.registry import FAMILIES
from megatron_rmipo.families.tensors import rules_of, tensors_of
from megatron_rmipo.runtime.groups import ProcessGroups


def load_hf_weights(model: Module, hf_dir: Path, arch: ModelArchitecture, *, groups: ProcessGroups) -> None:
    """Load a Hugging Face checkpoint into this rank's part of a model. No communication; each rank reads only its slices.

    Args:
        model: a GPTModel, wrapped or not, by local or Transformer Engine spec; its parameters, and the biases of its routers, are
            overwritten, in their own dtype. Rows of vocabulary padding become zeros.
        hf_dir: the Hugging Face directory.
        arch: what :func:`megatron_rmipo.families.hf_config.read_architecture` read from it.
        groups: say which part this rank holds.

    Raises:
        ConversionError: weights are missing, truncated or of other shapes, a tensor is not mapped or not used, or the model's
            parameters are not those of ``arch`` at this parallel size.
    """
    files = open_weights(hf_dir, arch)
    rules = {rule.megatron: rule for rule in rules_of(arch)}
    for (name, place), tensor in local_tensors(model, arch, groups).items():
        rule = rules[name]
        group = sharing_group(rule, groups)
        _check_shape(tensor, rule, arch, group.size())
        fill_shard(tensor, files, rule, place, arch, group.rank(), group.size())


def local_tensors(model: Module, arch: ModelArchitecture, groups: ProcessGroups) -> dict[TensorId, Tensor]:
    """This rank's tensors by checkpoint name and place, layers counted over all stages, experts over all expert-parallel ranks.

    The output layer of a tied model, which a last stage holds as a copy, appears under the embedding's name.

    Raises:
        ConversionError: the model has parameters that a checkpoint of ``arch`` does not hold.
    """
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module  # DDP and mixed-precision wrappers
    family = FAMILIES[arch.family]
    known = {(rule.megatron, place) for rule, place in tensors_of(arch)}
    first_layer = next((layer.layer_number - 1 for layer in inner.decoder.layers), 0)
    first_expert = groups.ep.rank() * arch.experts.num_experts // groups.ep.size() if arch.experts else 0
    found: dict[TensorId, Tensor] = {}
    unknown = []
    parameters = dict(inner.named_parameters())
    for full_name, tensor in {**parameters, **dict(inner.named_buffers())}.items():
        names, local = canonical_names(full_name)
        place = Place(_counted_from(first_layer, local.layer), _counted_from(first_expert, local.expert))
        if arch.tied_embeddings and names == (family.head,):
            names = (family.embedding,)
        name = next((name for name in names if (name, place) in known), None)
        if name is not None:
            found[name, place] = tensor.detach()
        elif full_name in parameters:
            unknown.append(full_name)
    if unknown:
        raise ConversionError(
            f"The model has {len(unknown)} parameters that its {arch.family} checkpoint does not hold: "
            f"{', '.join(unknown[:6])}. Build it from the checkpoint's config.json, without extensions."
        )
    return found


def _counted_from(first: int, number: int | None) -> int | None:
    return None if number is None else first + number


def export_hf(
    model: Module,
    arch: ModelArchitecture,
    assets_dir: Path,
    save_dir: Path,
    *,
    dtype: torch.dtype | None,
    groups: ProcessGroups,
    max_shard_bytes: float = DEFAULT_SHARD_BYTES,
    before_each: Callable[[], None] = lambda: None,
) -> None:
    """Write a model as a Hugging Face directory. All ranks call it together.

    One tensor at a time, or one of an expert, is gathered on the first rank from those that hold it, un-merged and written;
    vocabulary padding is left out. ``save_dir`` appears when it is whole.

    Args:
        model: this rank's GPTModel, wrapped or not.
        arch: what the model is.
        assets_dir: holds config.json, generation config and tokenizer to put beside the weights.
        save_dir: missing or empty.
        dtype: dtype of the files; None keeps the parameters' own.
        groups: the process groups of this rank.
        max_shard_bytes: size at which another file is begun.
        before_each: called before each tensor, by all ranks together; what it raises ends the export, and nothing of it is left.

    Raises:
        ConversionError: on every rank, when the first one could not write, or none holds a tensor of the model.
    """
    gathered = GatheredTensors(local_tensors(model, arch, groups), arch, groups)
    tensors = gathered.each(before_each)
    failure = None
    if groups.rank == 0:
        rules = {rule.megatron: rule for rule in rules_of(arch)}
        dtypes = {name: dtype_to_store(rules[name], stored, dtype) for name, stored in gathered.dtypes.items()}
        try:
            write_hf_directory(Path(save_dir), Path(assets_dir), arch, tensors, dtypes, max_shard_bytes=max_shard_bytes)
        except ConversionError as error:
            failure = str(error)
        except OSError as error:
            failure = f"--save-hf {save_dir} cannot be written: {error}. Free some space or name another directory."
    # The others send the next tensor, so it is carried to its end even when this rank could not write.
    for _ in tensors:
        pass
    outcome = [failure]
    dist.broadcast_object_list(outcome, group=groups.world, group_src=0)
    if outcome[0] is not None:
        raise ConversionError(outcome[0])


def _check_shape(tensor: Tensor, rule: Rule, arch: ModelArchitecture, tp_size: int) -> None:
    found = tuple(tensor.shape)
    padded_vocab_size = found[0] * tp_size
    expected = rank_shape(rule, arch, tp_size, padded_vocab_size)
    if rule.layout is Layout.VOCABULARY and padded_vocab_size < arch.vocab_size:
        raise ConversionError(
            f"The model has room for {padded_vocab_size} tokens, but the checkpoint's vocabulary is {arch.vocab_size}."
        )
    if found != expected:
        wanted = list(expected) if expected else "impossible to cut"
        kind = "expert tensor" if rule.per_expert else "tensor"
        raise ConversionError(
            f"The model's {rule.megatron} has shape {list(found)} on a rank, but the checkpoint at {kind} parallel size "
            f"{tp_size} makes it {wanted}. Build the model from the checkpoint's config.json."
        )
