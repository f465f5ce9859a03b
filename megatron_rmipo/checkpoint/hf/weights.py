"""Hugging Face checkpoints into a Megatron model and out of it, one tensor group at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_rmipo.checkpoint.hf.mappings import canonical_name, check_keys
from megatron_rmipo.checkpoint.hf.safetensors_files import WeightFiles, row_pieces
from megatron_rmipo.checkpoint.hf.shards import fill_shard, join_shards, rank_shape
from megatron_rmipo.checkpoint.hf.writer import DEFAULT_SHARD_BYTES, MegatronTensor, write_hf_directory
from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Layout, Rule
from megatron_rmipo.families.registry import FAMILIES
from megatron_rmipo.families.tensors import megatron_shape, rules_of, source_shapes, tensors_of

TensorId = tuple[str, int | None]


def load_hf_weights(model: Module, hf_dir: Path, arch: ModelArchitecture, *, tp_rank: int, tp_size: int) -> None:
    """Load a Hugging Face checkpoint into this rank's part of a model. No communication; each rank reads only its slices.

    Args:
        model: a GPTModel, wrapped or not, by local or Transformer Engine spec; its parameters are overwritten, in their own
            dtype. Rows of vocabulary padding become zeros.
        hf_dir: the Hugging Face directory.
        arch: what :func:`megatron_rmipo.families.hf_config.read_architecture` read from it.
        tp_rank: this rank's place in the tensor-parallel group.
        tp_size: size of that group.

    Raises:
        ConversionError: weights are missing, truncated or of other shapes, a tensor is not mapped or not used, or the model's
            parameters are not those of ``arch`` at this parallel size.
    """
    files = open_weights(hf_dir, arch)
    rules = {rule.megatron: rule for rule in rules_of(arch)}
    for (name, layer), parameter in local_parameters(model, arch).items():
        rule = rules[name]
        _check_shape(parameter, rule, arch, tp_size)
        fill_shard(parameter.data, files, rule, layer, arch, tp_rank, tp_size)


def open_weights(hf_dir: Path, arch: ModelArchitecture) -> WeightFiles:
    """Open a Hugging Face checkpoint and check that it holds exactly the tensors of ``arch``.

    Raises:
        ConversionError: as :func:`load_hf_weights`.
    """
    files = WeightFiles(hf_dir)
    check_keys(files.tensors, arch, str(hf_dir))
    for rule, layer in tensors_of(arch):
        for name, shape in zip(rule.source_names(layer), source_shapes(rule, arch), strict=True):
            files.expect(name, shape)
    if arch.tied_embeddings:
        _check_tied_head(files, arch)
    return files


def local_parameters(model: Module, arch: ModelArchitecture) -> dict[TensorId, Parameter]:
    """This rank's parameters by checkpoint name and layer, counted over all stages.

    The output layer of a tied model, which a last stage holds as a copy, appears under the embedding's name.

    Raises:
        ConversionError: the model has parameters that a checkpoint of ``arch`` does not hold.
    """
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module  # DDP and mixed-precision wrappers
    family = FAMILIES[arch.family]
    known = {rule.megatron for rule in rules_of(arch)} | {family.head}
    first_layer = next((layer.layer_number - 1 for layer in inner.decoder.layers), 0)
    found: dict[TensorId, Parameter] = {}
    unknown = []
    for full_name, parameter in inner.named_parameters():
        name, local_layer = canonical_name(full_name, known)
        if name not in known:
            unknown.append(full_name)
            continue
        if name == family.head and arch.tied_embeddings:
            name = family.embedding
        found[name, None if local_layer is None else first_layer + local_layer] = parameter
    if unknown:
        raise ConversionError(
            f"The model has {len(unknown)} parameters that its {arch.family} checkpoint does not hold: "
            f"{', '.join(unknown[:6])}. Build it from the checkpoint's config.json, without extensions."
        )
    return found


def export_hf(
    model: Module,
    arch: ModelArchitecture,
    assets_dir: Path,
    save_dir: Path,
    *,
    dtype: torch.dtype | None,
    tp_group: dist.ProcessGroup,
    pp_group: dist.ProcessGroup,
    max_shard_bytes: float = DEFAULT_SHARD_BYTES,
    before_each: Callable[[], None] = lambda: None,
) -> None:
    """Write a model as a Hugging Face directory. Every rank of one TP x PP replica calls it together.

    Each tensor group is gathered over its stage's tensor-parallel group, sent to the replica's first rank, un-merged and
    written there; vocabulary padding is left out. ``save_dir`` appears when it is whole.

    Args:
        model: this rank's GPTModel, wrapped or not.
        arch: what the model is.
        assets_dir: holds config.json, generation config and tokenizer to put beside the weights.
        save_dir: missing or empty.
        dtype: dtype of the files; None keeps the parameters' own.
        tp_group: this rank's tensor-parallel group.
        pp_group: this rank's pipeline group, first stage first.
        max_shard_bytes: size at which another file is begun.
        before_each: called before each tensor, by all ranks together; what it raises ends the export, and nothing of it is left.

    Raises:
        ConversionError: on every rank, when the first one could not write.
    """
    parameters = local_parameters(model, arch)
    stages = _tensors_by_stage(parameters, pp_group)
    tensors = _gather_tensors(parameters, arch, stages, tp_group, pp_group, before_each)
    failure = None
    if tp_group.rank() == 0 and pp_group.rank() == 0:
        dtypes = {name: dtype or stored for held in stages for (name, _), stored in held.items()}
        try:
            write_hf_directory(Path(save_dir), Path(assets_dir), arch, tensors, dtypes, max_shard_bytes=max_shard_bytes)
        except ConversionError as error:
            failure = str(error)
        except OSError as error:
            failure = f"--save-hf {save_dir} cannot be written: {error}. Free some space or name another directory."
    # The others wait in the gather of the next tensor, so it is carried to its end even when this rank could not write.
    for _ in tensors:
        pass
    outcome = [failure]
    if pp_group.rank() == 0:
        dist.broadcast_object_list(outcome, group=tp_group, group_src=0)
    dist.broadcast_object_list(outcome, group=pp_group, group_src=0)
    if outcome[0] is not None:
        raise ConversionError(outcome[0])


def _gather_tensors(
    parameters: dict[TensorId, Parameter],
    arch: ModelArchitecture,
    stages: list[dict[TensorId, torch.dtype]],
    tp_group: dist.ProcessGroup,
    pp_group: dist.ProcessGroup,
    before_each: Callable[[], None],
) -> Iterator[MegatronTensor]:
    """Whole tensors in checkpoint order, on the replica's first rank; elsewhere it ends without giving any."""
    for rule, layer in tensors_of(arch):
        before_each()
        key = rule.megatron, layer
        owner = next(stage for stage, held in enumerate(stages) if key in held)
        whole = None
        if pp_group.rank() == owner:
            whole = _gather_shards(parameters[key].detach(), rule, tp_group)
        if tp_group.rank() == 0 and owner != 0:
            whole = _send_to_first_stage(whole, rule, arch, stages[owner][key], owner, pp_group)
        if tp_group.rank() == 0 and pp_group.rank() == 0:
            assert whole is not None
            yield MegatronTensor(rule, layer, whole.dtype, _row_reader(whole))


def _row_reader(tensor: Tensor) -> Callable[[int, int], Tensor]:
    return lambda start, stop: tensor[start:stop]


def _gather_shards(shard: Tensor, rule: Rule, tp_group: dist.ProcessGroup) -> Tensor | None:
    if tp_group.size() == 1 or not rule.is_cut:
        return shard
    # As bytes, which every backend gathers.
    data = shard.contiguous().view(torch.uint8)
    parts = [torch.empty_like(data) for _ in range(tp_group.size())] if tp_group.rank() == 0 else None
    dist.gather(data, parts, group=tp_group, group_dst=0)
    return None if parts is None else join_shards([part.view(shard.dtype) for part in parts], rule)


def _send_to_first_stage(
    whole: Tensor | None, rule: Rule, arch: ModelArchitecture, dtype: torch.dtype, owner: int, pp_group: dist.ProcessGroup
) -> Tensor | None:
    shape = megatron_shape(rule, arch)
    if pp_group.rank() == owner:
        assert whole is not None
        dist.send(whole[: shape[0]].contiguous().view(torch.uint8), group=pp_group, group_dst=0)
    elif pp_group.rank() == 0:
        device = torch.cuda.current_device() if dist.get_backend(pp_group) == "nccl" else "cpu"
        whole = torch.empty(shape, dtype=dtype, device=device)
        dist.recv(whole.view(torch.uint8), group=pp_group, group_src=owner)
        return whole
    return None


def _tensors_by_stage(parameters: dict[TensorId, Parameter], pp_group: dist.ProcessGroup) -> list[dict[TensorId, torch.dtype]]:
    held: list[dict[TensorId, torch.dtype]] = [{} for _ in range(pp_group.size())]
    dist.all_gather_object(held, {key: parameter.dtype for key, parameter in parameters.items()}, group=pp_group)
    return held


def _check_shape(parameter: Parameter, rule: Rule, arch: ModelArchitecture, tp_size: int) -> None:
    found = tuple(parameter.shape)
    padded_vocab_size = found[0] * tp_size
    expected = rank_shape(rule, arch, tp_size, padded_vocab_size)
    if rule.layout is Layout.VOCABULARY and padded_vocab_size < arch.vocab_size:
        raise ConversionError(
            f"The model has room for {padded_vocab_size} tokens, but the checkpoint's vocabulary is {arch.vocab_size}."
        )
    if found != expected:
        wanted = list(expected) if expected else "impossible to cut"
        raise ConversionError(
            f"The model's {rule.megatron} has shape {list(found)} on a rank, but the checkpoint at tensor parallel size "
            f"{tp_size} makes it {wanted}. Build the model from the checkpoint's config.json."
        )


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
