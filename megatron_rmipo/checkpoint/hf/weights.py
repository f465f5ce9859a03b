"""Hugging Face checkpoints into a Megatron model and out of it, one tensor group at a time."""

from __future__ import annotations

import contextlib
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_rmipo.checkpoint.hf.checked_weights import open_weights
from megatron_rmipo.checkpoint.hf.for_inference import NOTHING_ELSE, Beside
from megatron_rmipo.checkpoint.hf.gathering import GatheredTensors, sharing_group
from megatron_rmipo.checkpoint.hf.output_files import write_index
from megatron_rmipo.checkpoint.hf.safetensors_files import WeightFiles
from megatron_rmipo.checkpoint.hf.shards import fill_shard, rank_shape
from megatron_rmipo.checkpoint.hf.shared_reading import read_in_shares, share_reading
from megatron_rmipo.checkpoint.hf.shared_writing import ShareWriter, share_files
from megatron_rmipo.checkpoint.hf.writer import (
    DEFAULT_SHARD_BYTES,
    ModelFile,
    begin_hf_directory,
    dtype_to_store,
    plan_model_files,
)
from megatron_rmipo.checkpoint.whole_directories import SEEN_WITHIN_SECONDS, check_output_directory, is_seen, new_directory
from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Layout, Rule
from megatron_rmipo.families.parameter_names import TensorId
from megatron_rmipo.families.tensors import rules_of
from megatron_rmipo.model.named_tensors import named_tensors
from megatron_rmipo.runtime.agreement import on_each_rank_alone, on_every_rank, on_first_rank
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.runtime.messages import rank_label
from megatron_rmipo.runtime.shared_work import Halt, SharedWork
from megatron_rmipo.runtime.signals import RunStopped, StopRequest

# This rank's part of a model, wrapped or not; of an interleaved pipeline its chunks. Not by the seam to Megatron's models:
# converters use this file, too, and need no Megatron-Core.
Chunks = Module | Sequence[Module]
_REFUSED = "--save-hf {} cannot be written: {}. Free some space or name another directory."


def load_hf_weights(
    model: Chunks,
    hf_dir: Path,
    arch: ModelArchitecture,
    *,
    groups: ProcessGroups,
    read: Literal["each", "broadcast"] = "each",
    base: Path | None = None,
) -> None:
    """Load a Hugging Face checkpoint into this rank's part of a model, reading no more than its slices.

    Args:
        model: a GPTModel, wrapped or not, by local or Transformer Engine spec, or its chunks; its parameters, and the biases of
            its routers, are overwritten, in their own dtype. Rows of vocabulary padding become zeros.
        hf_dir: the Hugging Face directory, or that of an adapter.
        arch: what :func:`megatron_rmipo.families.hf_config.read_architecture` read from it.
        groups: say which part this rank holds.
        read: ``each`` rank reads its slices, without communication; ``broadcast``: ranks that hold the same slices share the
            reading out and send each other what they read. All ranks call that together.
        base: the base model of an adapter; None: the directory that it names.

    Raises:
        ConversionError: weights are missing, truncated or of other shapes, a tensor is not mapped or not used, or the model's
            parameters are not those of ``arch`` at this parallel size. With ``broadcast`` on every rank.
    """

    def open_here() -> tuple[WeightFiles, dict[TensorId, Tensor]]:
        held = local_tensors(model, arch, groups)
        for (name, _), tensor in held.items():
            _check_shape(tensor, rules[name], arch, sharing_group(rules[name], groups).size())
        return open_weights(hf_dir, arch, base), held

    def fill(key: TensorId, tensor: Tensor) -> None:
        rule = rules[key[0]]
        group = sharing_group(rule, groups)
        fill_shard(tensor, files, rule, key[1], arch, group.rank(), group.size())

    rules = {rule.megatron: rule for rule in rules_of(arch)}
    if read == "broadcast":
        files, held = on_each_rank_alone(groups.world, open_here)
        read_in_shares(held, share_reading(held, rules, groups), fill, groups)
        return
    files, held = open_here()
    for key, tensor in held.items():
        fill(key, tensor)


def local_tensors(model: Chunks, arch: ModelArchitecture, groups: ProcessGroups) -> dict[TensorId, Tensor]:
    """This rank's tensors by checkpoint name and place, layers counted over all stages, experts over all expert-parallel ranks.

    Those of adapters are left out.

    Raises:
        ConversionError: the model has parameters that a checkpoint of ``arch`` does not hold.
    """
    found: dict[TensorId, Tensor] = {}
    unknown = []
    for one in named_tensors(model, arch, groups):
        if one.known_as is not None:
            found[one.known_as] = one.tensor.detach()
        elif isinstance(one.tensor, Parameter):
            unknown.append(one.full_name)
    if unknown:
        raise ConversionError(
            f"The model has {len(unknown)} parameters that its {arch.family} checkpoint does not hold: "
            f"{', '.join(unknown[:6])}. Build it from the checkpoint's config.json, without extensions."
        )
    return found


def export_hf(
    model: Chunks,
    arch: ModelArchitecture,
    assets_dir: Path,
    save_dir: Path,
    *,
    dtype: torch.dtype | None,
    groups: ProcessGroups,
    max_shard_bytes: float = DEFAULT_SHARD_BYTES,
    stop: StopRequest | None = None,
    beside: Beside = NOTHING_ELSE,
) -> None:
    """Write a model as a Hugging Face directory. All ranks call it together.

    Each file is written by one rank of the stage that holds its tensors, and many at the same time: one tensor at a time, or one
    of an expert, is put together there, un-merged and written; vocabulary padding is left out. The first rank shows how far all
    are. ``save_dir`` appears when it is whole.

    Args:
        model: this rank's GPTModel, wrapped or not, or its chunks.
        arch: what the model is.
        assets_dir: holds config.json, generation config and tokenizer to put beside the weights.
        save_dir: missing or empty, on a file system that every rank sees.
        dtype: dtype of the files; None keeps the parameters' own.
        groups: the process groups of this rank.
        max_shard_bytes: size at which another file is begun, which happens at the borders of pipeline stages, too.
        stop: looked at before each tensor, on each rank by itself; a signal on any rank ends the export.
        beside: what else belongs to the model; of the first rank.

    Raises:
        ConversionError: on every rank: one could not write or does not see the directory, or none holds a tensor of the model.
        RunStopped: on every rank: a signal ended it. Nothing of it is left then, nor after an error.
    """
    save_dir = Path(save_dir)
    held = local_tensors(model, arch, groups)
    tensors = on_every_rank(groups.world, lambda: GatheredTensors(held, arch, groups))
    files = _files_of(tensors, arch, dtype, max_shard_bytes)
    with contextlib.ExitStack() as stack:

        def begin() -> Path:
            with _told_of(save_dir):
                check_output_directory(save_dir, "--save-hf")
                partial = stack.enter_context(new_directory(save_dir))
                begin_hf_directory(save_dir, partial, Path(assets_dir), files, beside)
                return partial

        def end() -> None:
            with _told_of(save_dir):
                write_index(directory, [file.plan for file in files])
                stack.close()

        directory = on_first_rank(groups.world, begin)
        shares = share_files(files, groups.pp_rank, groups.dp_cp.size(), groups.tp_size)
        on_each_rank_alone(groups.world, lambda: _check_seen(directory, save_dir, groups))
        total_bytes = sum(tensor.num_bytes for file in files for tensor in file.plan.tensors)
        work = SharedWork(str(directory), groups.world, title=f"writing {save_dir}", total_bytes=total_bytes, stop=stop)
        halt = _work_off(work, lambda: ShareWriter(directory, arch, tensors, work).write(shares))
        if halt is not None:
            on_first_rank(groups.world, lambda: shutil.rmtree(directory, ignore_errors=True))
            if halt.kind == "stopped":
                raise RunStopped(halt.text)
            raise ConversionError(_REFUSED.format(save_dir, halt.text))
        on_first_rank(groups.world, end)


def _files_of(
    tensors: GatheredTensors, arch: ModelArchitecture, dtype: torch.dtype | None, max_shard_bytes: float
) -> list[ModelFile]:
    rules = {rule.megatron: rule for rule in rules_of(arch)}
    dtypes = {name: dtype_to_store(rules[name], holder.dtype, dtype) for (name, _), holder in tensors.holders.items()}
    stages = {key: holder.stage for key, holder in tensors.holders.items()}
    return plan_model_files(arch, dtypes, max_shard_bytes, stages)


def _work_off(work: SharedWork, write: Callable[[], None]) -> Halt | None:
    """Do this rank's share and wait for the others'; why nothing came of it, or None."""
    try:
        write()
    except BaseException as error:
        # No rank that waits for this one would hear of it else.
        with contextlib.suppress(RuntimeError):
            work.halt(Halt("lost", f"{rank_label()}{type(error).__name__}: {error}"))
        raise
    return work.finish()


def _check_seen(directory: Path, save_dir: Path, groups: ProcessGroups) -> None:
    if not is_seen(directory, time.monotonic() + SEEN_WITHIN_SECONDS):
        raise ConversionError(
            f"--save-hf {save_dir}: rank {groups.rank} on {socket.gethostname()} does not see {directory}, which the first rank "
            "has made. The ranks write it together: name a directory on a file system that all hosts share."
        )


@contextlib.contextmanager
def _told_of(save_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConversionError(_REFUSED.format(save_dir, error)) from error


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
