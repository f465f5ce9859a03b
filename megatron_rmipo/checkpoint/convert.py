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
from megatron_rmipo.checkpoint.hf.checked_weights import open_weights
from megatron_rmipo.checkpoint.hf.for_inference import Beside
from megatron_rmipo.checkpoint.hf.safetensors_files import WeightFiles, row_pieces
from megatron_rmipo.checkpoint.hf.shards import fill_rows
from megatron_rmipo.checkpoint.hf.writer import DEFAULT_SHARD_BYTES, MegatronTensor, dtype_to_store, write_hf_directory
from megatron_rmipo.checkpoint.megatron.commit import abandon_checkpoint, begin_checkpoint, commit_checkpoint
from megatron_rmipo.checkpoint.megatron.common_state import CONTENT
from megatron_rmipo.checkpoint.megatron.digests import check_digests, damage
from megatron_rmipo.checkpoint.megatron.directory import (
    ASSETS_NAME,
    checkpoint_path,
    choose_checkpoint,
    find_checkpoint,
    hf_assets_directory,
)
from megatron_rmipo.checkpoint.megatron.keys import Location, extra_state_keys, location_of
from megatron_rmipo.checkpoint.megatron.megatron_lm_args import common_of_model
from megatron_rmipo.checkpoint.megatron.owner import OWNER_NAME, DirectoryOwner
from megatron_rmipo.checkpoint.megatron.record import AskedIteration, CheckpointRecord, read_record
from megatron_rmipo.checkpoint.megatron.torch_dist import Entry, Piece, TorchDistReader, write_torch_dist
from megatron_rmipo.checkpoint.peft.forms import form_of_plan
from megatron_rmipo.checkpoint.peft.reading import CARD_NAME, model_directory, refuse_idle_base
from megatron_rmipo.checkpoint.peft.writing import write_adapter
from megatron_rmipo.checkpoint.saved_adapters.bridge_adapter import holds_bridge_adapter, read_bridge_adapter
from megatron_rmipo.checkpoint.saved_adapters.own_adapter import base_of_record, plan_of_record, read_own_adapter
from megatron_rmipo.checkpoint.saved_adapters.saved_adapter import SavedAdapter
from megatron_rmipo.checkpoint.whole_directories import (
    INCOMPLETE_SUFFIX,
    REMOVED_SUFFIX,
    check_output_directory,
    check_space,
    wait_for_removals,
)
from megatron_rmipo.errors import CheckpointError, ConversionError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Layout, Place, Rule
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.families.parameter_names import TensorId
from megatron_rmipo.families.tensors import megatron_shape, tensors_of
from megatron_rmipo.runtime.messages import warn

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def convert_hf_to_megatron(hf_dir: Path, save_dir: Path, *, dtype: str | None = None, base: Path | None = None) -> Path:
    """Write a Hugging Face model as a ``torch_dist`` checkpoint, ``save_dir/release``.

    Args:
        hf_dir: config.json, safetensors, tokenizer; or an adapter, which is merged.
        base: the base model of an adapter; None: the directory that it names.
        save_dir: missing or empty.
        dtype: ``float32``, ``float16`` or ``bfloat16``; None keeps what the files hold.

    Returns:
        The checkpoint's path.

    Raises:
        ConversionError: the model is not supported, its files are damaged, ``save_dir`` holds something, or the disk is full.
    """
    refuse_idle_base(base, hf_dir)
    config_dir = model_directory(hf_dir, base)
    arch = read_architecture(config_dir)
    files = open_weights(hf_dir, arch, base)
    save_dir = Path(save_dir)
    check_output_directory(save_dir, "--save", ignoring=(INCOMPLETE_SUFFIX, REMOVED_SUFFIX, OWNER_NAME))
    entries = _entries(files, arch, _DTYPES[dtype] if dtype else None)
    try:
        check_space(save_dir, sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in entries))
        with DirectoryOwner(save_dir):
            return _write_release(save_dir, config_dir, entries, arch)
    except OSError as error:
        raise ConversionError(
            f"--save {save_dir} cannot be written: {error}. Free some space or name another directory."
        ) from error


def _write_release(save_dir: Path, hf_dir: Path, entries: list[Entry], arch: ModelArchitecture) -> Path:
    partial_dir = begin_checkpoint(save_dir, "release")
    tokenizer = checkpoint_path(save_dir, "release").absolute() / ASSETS_NAME
    common = common_of_model(arch, 0, dtype=entries[0].dtype, tokenizer=tokenizer, run={"no_save_optim": True})
    try:
        digests = write_torch_dist(partial_dir, entries, extra_state_keys(arch), {**common, "content_metadata": CONTENT})
        copy_hf_assets(hf_dir, partial_dir / ASSETS_NAME)
        set_config_dtype(partial_dir / ASSETS_NAME / "config.json", entries[0].dtype)
        return commit_checkpoint(partial_dir, CheckpointRecord("release"), digests)
    except BaseException:
        abandon_checkpoint(partial_dir)
        wait_for_removals()
        raise


def convert_megatron_to_hf(
    load_dir: Path,
    save_dir: Path,
    *,
    iteration: AskedIteration | None = None,
    dtype: str | None = None,
    assets_dir: Path | None = None,
    max_shard_bytes: float = DEFAULT_SHARD_BYTES,
    verify: bool = True,
) -> Path:
    """Write a checkpoint's model as a Hugging Face directory; where it holds an adapter alone, that as one of PEFT.

    Args:
        load_dir: directory of checkpoints, of training at any layout, of :func:`convert_hf_to_megatron`, of Megatron-LM, or of
            Megatron-Bridge's adapters.
        save_dir: missing or empty.
        iteration: which one; ``best`` for that of the best evaluation, None for the latest complete.
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
    card = assets / CARD_NAME
    # A run writes its card beside the tokenizer; one in a directory that was named is of another model.
    text = card.read_text(encoding="utf-8") if assets_dir is None and card.is_file() else None
    adapter, base = _saved_adapter(reader, arch)
    if adapter is not None:
        _refuse_idle(dtype, max_shard_bytes, path)
        form = form_of_plan(adapter.plan, arch, str(assets if assets_dir is not None or base is None else base))
        write_adapter(Path(save_dir), form, adapter.factors, adapter.whole, card=text, flag="--save-hf")
        return path
    locations = _locate(reader, arch)
    asked = _DTYPES[dtype] if dtype else None
    dtypes = {
        rule.megatron: dtype_to_store(rule, reader.dtype(locations[rule.megatron, place].key), asked)
        for rule, place in tensors_of(arch)
    }
    read = partial(_read_tensor, reader, locations)
    try:
        write_hf_directory(Path(save_dir), assets, arch, read, dtypes, max_shard_bytes=max_shard_bytes, beside=Beside(card=text))
    except OSError as error:
        raise ConversionError(
            f"--save-hf {save_dir} cannot be written: {error}. Free some space or name another directory."
        ) from error
    return path


def _saved_adapter(reader: TorchDistReader, arch: ModelArchitecture) -> tuple[SavedAdapter | None, Path | None]:
    """The adapter that a checkpoint holds alone, None of a whole model; and its base model's directory where it says that."""
    record = read_record(reader.directory)
    if record is None:
        return (read_bridge_adapter(reader, arch) if holds_bridge_adapter(reader) else None), None
    if record.adapter is None:
        return None, None
    return read_own_adapter(reader, plan_of_record(record.adapter, reader.directory), arch), base_of_record(record.adapter)


def _refuse_idle(dtype: str | None, max_shard_bytes: float, path: Path) -> None:
    """Refuse what does nothing for an adapter, which is one file of fp32."""
    given = {"--dtype": dtype is not None, "--max-shard-size": max_shard_bytes != DEFAULT_SHARD_BYTES}
    if any(given.values()):
        idle = " and ".join(flag for flag, is_given in given.items() if is_given)
        raise ConversionError(
            f"{path} holds an adapter, which is written as one file in fp32: {idle} does nothing. Leave it out."
        )


def _refuse_damage(path: Path) -> None:
    record = read_record(path)
    damaged = check_digests(path, record) if record is not None else []
    if damaged:
        raise CheckpointError(
            f"{damage(path, damaged)}. Convert another one with --iteration N, or this one as it is with --no-verify-checkpoint."
        )


def _entries(files: WeightFiles, arch: ModelArchitecture, dtype: torch.dtype | None) -> list[Entry]:
    places: dict[Rule, list[Place]] = {}
    for rule, place in tensors_of(arch):
        places.setdefault(rule, []).append(place)
    return [entry for rule, there in places.items() for entry in _entries_of(files, rule, there, arch, dtype)]


def _entries_of(
    files: WeightFiles, rule: Rule, places: list[Place], arch: ModelArchitecture, dtype: torch.dtype | None
) -> Iterator[Entry]:
    shape = megatron_shape(rule, arch)
    stored = {files.tensors[name].dtype for place in places for name in rule.source_names(place)}
    if dtype is None and len(stored) > 1:
        found = ", ".join(sorted(str(item).removeprefix("torch.") for item in stored))
        raise ConversionError(
            f"{files.directory}: {', '.join(rule.sources)} are stored partly in {found}, which one Megatron tensor cannot hold. "
            "Choose one with --dtype."
        )
    target = dtype_to_store(rule, stored.pop(), dtype)
    pieces: dict[str, list[Piece]] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    for place in places:
        key, index, sizes_before = location_of(rule.megatron, place, arch, apart=arch.has_mixed_layers)
        sizes[key] = sizes_before
        # What is transposed on the way is read whole.
        for start, stop in [(0, shape[0])] if rule.is_stacked else row_pieces(shape, target):
            box = (*(1 for _ in index), stop - start, *shape[1:])
            fill = partial(_fill_piece, files, rule, place, arch, start)
            pieces.setdefault(key, []).append(Piece((*index, start, *(0 for _ in shape[1:])), box, fill))
    for key, there in pieces.items():
        yield Entry(key, (*sizes[key], *shape), target, tuple(there))


def _fill_piece(files: WeightFiles, rule: Rule, place: Place, arch: ModelArchitecture, start: int, piece: Tensor) -> None:
    rows = piece.view(piece.shape[piece.dim() - len(megatron_shape(rule, arch)) :])
    fill_rows(rows, files, rule, place, arch, start)


def _locate(reader: TorchDistReader, arch: ModelArchitecture) -> dict[TensorId, Location]:
    """Where every tensor of the model is stored: in entries of all layers, or in one entry a layer.

    Raises:
        ConversionError: tensors are missing, of other shapes, or not those of the model.
    """
    found: dict[TensorId, Location] = {}
    faults = []
    for rule, place in tensors_of(arch):
        forms = [location_of(rule.megatron, place, arch, apart=apart) for apart in (True, False)]
        location = next((form for form in forms if form.key in reader.tensors), None)
        if location is None:
            faults.append(f"{forms[not arch.has_mixed_layers].key} is missing")
            continue
        expected, stored = (*location.sizes, *megatron_shape(rule, arch)), reader.shape(location.key)
        rows = len(location.sizes)
        padded = rule.layout is Layout.VOCABULARY and stored[1:] == expected[1:] and stored[rows] >= expected[rows]
        if stored != expected and not padded:
            faults.append(f"{location.key} is {list(stored)}, but config.json makes it {list(expected)}")
        found[rule.megatron, place] = location
    used = {location.key for location in found.values()}
    weights = ("embedding.", "decoder.", "output_layer.", "mtp.")
    faults += [f"{key} is not a tensor of the model" for key in reader.tensors if key.startswith(weights) and key not in used]
    if faults:
        faults = list(dict.fromkeys(faults))
        shown = [f"  {fault}" for fault in faults[:8]] + ([f"  and {len(faults) - 8} more"] if len(faults) > 8 else [])
        raise ConversionError(f"{reader.directory} does not hold the model its config.json describes:\n" + "\n".join(shown))
    return found


def _read_tensor(reader: TorchDistReader, locations: dict[TensorId, Location], rule: Rule, place: Place) -> MegatronTensor:
    key, index, _ = locations[rule.megatron, place]
    return MegatronTensor(rule, place, reader.dtype(key), partial(reader.read_rows, key, index))
