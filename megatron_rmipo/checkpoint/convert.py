"""Hugging Face to Megatron and back on one process, without a model, a GPU or a process group, a piece at a time.

Any training layout can load what :func:`convert_hf_to_megatron` writes, and :func:`convert_megatron_to_hf` reads what any wrote.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_rmipo.checkpoint.hf.assets import copy_hf_assets, set_config_dtype
from megatron_rmipo.checkpoint.hf.safetensors_files import WeightFiles, row_pieces
from megatron_rmipo.checkpoint.hf.shards import fill_rows
from megatron_rmipo.checkpoint.hf.weights import open_weights
from megatron_rmipo.checkpoint.hf.writer import DEFAULT_SHARD_BYTES, MegatronTensor, write_hf_directory
from megatron_rmipo.checkpoint.megatron.commit import abandon_checkpoint, begin_checkpoint, commit_checkpoint
from megatron_rmipo.checkpoint.megatron.digests import check_digests, damage
from megatron_rmipo.checkpoint.megatron.directory import (
    ASSETS_NAME,
    choose_checkpoint,
    find_checkpoint,
    hf_assets_directory,
)
from megatron_rmipo.checkpoint.megatron.owner import OWNER_NAME, DirectoryOwner
from megatron_rmipo.checkpoint.megatron.record import CheckpointRecord, Iteration, read_record
from megatron_rmipo.checkpoint.megatron.torch_dist import Entry, Piece, TorchDistReader, write_torch_dist
from megatron_rmipo.checkpoint.whole_directories import INCOMPLETE_SUFFIX, check_output_directory, check_space
from megatron_rmipo.errors import CheckpointError, ConversionError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Layout, Rule
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.families.tensors import megatron_shape, rules_of, tensors_of
from megatron_rmipo.runtime.messages import warn

_COMMON = {
    "checkpoint_version": 3.0,
    "iteration": 0,
    "content_metadata": {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True},
}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def convert_hf_to_megatron(hf_dir: Path, save_dir: Path, *, dtype: str | None = None) -> Path:
    """Write a Hugging Face model as a ``torch_dist`` checkpoint, ``save_dir/release``.

    Args:
        hf_dir: config.json, safetensors, tokenizer.
        save_dir: missing or empty.
        dtype: ``float32``, ``float16`` or ``bfloat16``; None keeps what the files hold.

    Returns:
        The checkpoint's path.

    Raises:
        ConversionError: the model is not supported, its files are damaged, ``save_dir`` holds something, or the disk is full.
    """
    arch = read_architecture(hf_dir)
    files = open_weights(hf_dir, arch)
    save_dir = Path(save_dir)
    check_output_directory(save_dir, "--save", ignoring=(INCOMPLETE_SUFFIX, OWNER_NAME))
    entries = [_entry(files, rule, arch, _DTYPES[dtype] if dtype else None) for rule in rules_of(arch)]
    try:
        check_space(save_dir, sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in entries))
        with DirectoryOwner(save_dir):
            return _write_release(save_dir, hf_dir, entries, _extra_state_keys(arch))
    except OSError as error:
        raise ConversionError(
            f"--save {save_dir} cannot be written: {error}. Free some space or name another directory."
        ) from error


def _write_release(save_dir: Path, hf_dir: Path, entries: list[Entry], objects: list[str]) -> Path:
    partial_dir = begin_checkpoint(save_dir, "release")
    try:
        digests = write_torch_dist(partial_dir, entries, objects, _COMMON)
        copy_hf_assets(hf_dir, partial_dir / ASSETS_NAME)
        set_config_dtype(partial_dir / ASSETS_NAME / "config.json", entries[0].dtype)
        return commit_checkpoint(partial_dir, CheckpointRecord("release"), digests)
    except BaseException:
        abandon_checkpoint(partial_dir)
        raise


def convert_megatron_to_hf(
    load_dir: Path,
    save_dir: Path,
    *,
    iteration: Iteration | None = None,
    dtype: str | None = None,
    assets_dir: Path | None = None,
    max_shard_bytes: float = DEFAULT_SHARD_BYTES,
    verify: bool = True,
) -> Path:
    """Write a checkpoint's model as a Hugging Face directory.

    Args:
        load_dir: directory of checkpoints, of training at any layout, of :func:`convert_hf_to_megatron` or of Megatron-LM.
        save_dir: missing or empty.
        iteration: which one; None for the latest complete.
        dtype: dtype of the files; None keeps the checkpoint's.
        assets_dir: Hugging Face config and tokenizer, for checkpoints that carry none.
        max_shard_bytes: size at which another file is begun.
        verify: check the digests of the checkpoint's files first, which reads all of it.

    Returns:
        The checkpoint that was read.

    Raises:
        CheckpointError: there is no complete checkpoint, or its files are damaged.
        ConversionError: its tensors are not those of the model, ``save_dir`` holds something, or the disk is full.
    """
    if iteration is None:
        for line in choose_checkpoint(Path(load_dir)).passed_over:
            warn(line)
    path, found = find_checkpoint(Path(load_dir), iteration)
    if verify:
        _refuse_damage(path)
    assets = Path(assets_dir) if assets_dir is not None else hf_assets_directory(Path(load_dir), found)
    arch = read_architecture(assets)
    reader = TorchDistReader(path)
    keys = _locate(reader, arch)
    dtypes = {
        rule.megatron: _DTYPES[dtype] if dtype else reader.dtype(keys[rule.megatron, layer][0])
        for rule, layer in tensors_of(arch)
    }
    try:
        write_hf_directory(Path(save_dir), assets, arch, _tensors(reader, keys, arch), dtypes, max_shard_bytes=max_shard_bytes)
    except OSError as error:
        raise ConversionError(
            f"--save-hf {save_dir} cannot be written: {error}. Free some space or name another directory."
        ) from error
    return path


def _refuse_damage(path: Path) -> None:
    record = read_record(path)
    damaged = check_digests(path, record) if record is not None else []
    if damaged:
        raise CheckpointError(
            f"{damage(path, damaged)}. Convert another one with --iteration N, or this one as it is with --no-verify-checkpoint."
        )


def _entry(files: WeightFiles, rule: Rule, arch: ModelArchitecture, dtype: torch.dtype | None) -> Entry:
    shape = megatron_shape(rule, arch)
    layers = range(arch.num_layers) if rule.per_layer else [None]
    stored = {files.tensors[name].dtype for layer in layers for name in rule.source_names(layer)}
    if dtype is None and len(stored) > 1:
        found = ", ".join(sorted(str(item).removeprefix("torch.") for item in stored))
        raise ConversionError(
            f"{files.directory}: {', '.join(rule.sources)} are stored partly in {found}, which one Megatron tensor cannot hold. "
            "Choose one with --dtype."
        )
    target = dtype or stored.pop()
    pieces = []
    for layer in layers:
        prefix, ones = ((), ()) if layer is None else ((layer,), (1,))
        for start, stop in row_pieces(shape, target):
            box = (stop - start, *shape[1:])
            fill = partial(_fill_piece, files, rule, layer, arch, start)
            pieces.append(Piece((*prefix, start, *(0 for _ in shape[1:])), (*ones, *box), fill))
    return Entry(rule.megatron, (arch.num_layers, *shape) if rule.per_layer else shape, target, tuple(pieces))


def _fill_piece(files: WeightFiles, rule: Rule, layer: int | None, arch: ModelArchitecture, start: int, piece: Tensor) -> None:
    fill_rows(piece if layer is None else piece[0], files, rule, layer, arch, start)


def _extra_state_keys(arch: ModelArchitecture) -> list[str]:
    """Keys of the extra state (fp8 scales) that Megatron-Core's layers, local or Transformer Engine's, look for."""
    layers = [f"shard_{layer}_{arch.num_layers}" for layer in range(arch.num_layers)]
    owners = [rule.megatron.rpartition(".")[0] for rule in rules_of(arch) if rule.per_layer]
    modules = dict.fromkeys([*owners, "decoder.layers.self_attention.core_attention"])
    keys = [f"{module}._extra_state/{layer}" for module in modules for layer in layers]
    return [*keys, "decoder.final_layernorm._extra_state/shard_0_1"]


def _locate(reader: TorchDistReader, arch: ModelArchitecture) -> dict[tuple[str, int | None], tuple[str, int | None]]:
    """Entry and index in it of every tensor of the model; entries of all layers, or one entry a layer.

    Raises:
        ConversionError: tensors are missing, of other shapes, or not those of the model.
    """
    found: dict[tuple[str, int | None], tuple[str, int | None]] = {}
    faults = []
    for rule, layer in tensors_of(arch):
        shape = megatron_shape(rule, arch)
        apart = rule.megatron.replace("decoder.layers.", f"decoder.layers.{layer}.", 1)
        key, index = (apart, None) if apart in reader.tensors else (rule.megatron, layer)
        if key not in reader.tensors:
            faults.append(f"{key} is missing")
            continue
        expected = shape if index is None else (arch.num_layers, *shape)
        stored = reader.shape(key)
        rows = 0 if index is None else 1
        padded = rule.layout is Layout.VOCABULARY and stored[1:] == expected[1:] and stored[rows] >= expected[rows]
        if stored != expected and not padded:
            faults.append(f"{key} is {list(stored)}, but config.json makes it {list(expected)}")
        found[rule.megatron, layer] = key, index
    used = {key for key, _ in found.values()}
    weights = ("embedding.", "decoder.", "output_layer.", "mtp.")
    faults += [f"{key} is not a tensor of the model" for key in reader.tensors if key.startswith(weights) and key not in used]
    if faults:
        faults = list(dict.fromkeys(faults))
        shown = [f"  {fault}" for fault in faults[:8]] + ([f"  and {len(faults) - 8} more"] if len(faults) > 8 else [])
        raise ConversionError(f"{reader.directory} does not hold the model its config.json describes:\n" + "\n".join(shown))
    return found


def _tensors(
    reader: TorchDistReader, keys: dict[tuple[str, int | None], tuple[str, int | None]], arch: ModelArchitecture
) -> Iterator[MegatronTensor]:
    for rule, layer in tensors_of(arch):
        key, index = keys[rule.megatron, layer]
        yield MegatronTensor(rule, layer, reader.dtype(key), partial(reader.read_rows, key, index))
