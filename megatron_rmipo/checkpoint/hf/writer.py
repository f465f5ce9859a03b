"""Writing a Hugging Face model directory from Megatron tensors, whoever holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_rmipo.checkpoint.hf.assets import copy_hf_assets, set_config_dtype
from megatron_rmipo.checkpoint.hf.for_inference import NOTHING_ELSE, Beside
from megatron_rmipo.checkpoint.hf.output_files import FilePlan, FileWriter, TensorPlan, plan_files, write_index
from megatron_rmipo.checkpoint.hf.shards import source_rows
from megatron_rmipo.checkpoint.whole_directories import check_output_directory, check_space, new_directory
from megatron_rmipo.command import progress_bar
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Place, Rule
from megatron_rmipo.families.parameter_names import TensorId
from megatron_rmipo.families.tensors import stored_shapes, tensors_of

DEFAULT_SHARD_BYTES = 5e9


@dataclasses.dataclass(frozen=True)
class MegatronTensor:
    """A whole Megatron tensor, wherever its rows are.

    Attributes:
        rule: what it is.
        place: where it stands.
        dtype: its dtype.
        read: gives rows ``[start, stop)``.
    """

    rule: Rule
    place: Place
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]


class Part(NamedTuple):
    """What a file holds of a Megatron tensor: those Hugging Face tensors, by number, that are made of it and lie in the file."""

    rule: Rule
    place: Place
    sources: tuple[int, ...]


class ModelFile(NamedTuple):
    """A file of a directory, and what its tensors are made of, in their order."""

    plan: FilePlan
    parts: tuple[Part, ...]


def dtype_to_store(rule: Rule, dtype: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """The dtype a tensor is written in: the one asked for, if any; what only steers a router stays as precise as it is."""
    return dtype if asked is None or rule.is_buffer else asked


def plan_model_files(
    arch: ModelArchitecture, dtypes: Mapping[str, torch.dtype], max_shard_bytes: float, stages: Mapping[TensorId, int]
) -> list[ModelFile]:
    """The files of a model, in the order of :func:`megatron_rmipo.families.tensors.tensors_of`.

    Args:
        arch: the model.
        dtypes: dtype to store each Megatron name in.
        max_shard_bytes: size at which another file is begun.
        stages: the pipeline stage that holds a tensor, 0 where it is not said.
    """
    tensors: dict[str, TensorPlan] = {}
    for rule, place in tensors_of(arch):
        stage = stages.get((rule.megatron, place), 0)
        for name, shape in zip(rule.source_names(place), stored_shapes(rule, arch), strict=True):
            # A stack of all experts is named by each of them.
            tensors.setdefault(name, TensorPlan(name, shape, dtypes[rule.megatron], stage))
    files = plan_files(list(tensors.values()), max_shard_bytes)
    file_of = {tensor.name: number for number, file in enumerate(files) for tensor in file.tensors}
    parts: list[list[Part]] = [[] for _ in files]
    for rule, place in tensors_of(arch):
        numbers = [file_of[name] for name in rule.source_names(place)]
        for number in dict.fromkeys(numbers):
            sources = tuple(source for source, its in enumerate(numbers) if its == number)
            parts[number].append(Part(rule, place, sources))
    return [ModelFile(plan, tuple(its)) for plan, its in zip(files, parts, strict=True)]


def begin_hf_directory(
    save_dir: Path, partial: Path, assets_dir: Path, files: Sequence[ModelFile], beside: Beside = NOTHING_ELSE
) -> None:
    """Put what is no weight into a directory that is to hold them.

    Args:
        save_dir: what it is to be called.
        partial: the directory, empty.
        assets_dir: holds config.json and the tokenizer.
        files: of the weights, for which there must be space.
        beside: what else belongs to the model.

    Raises:
        ConversionError: there is no config.json.
        OSError: the file system refuses, or has too little space.
    """
    check_space(save_dir, sum(file.plan.num_bytes for file in files))
    copy_hf_assets(assets_dir, partial)
    # One dtype is told in the config; the embedding speaks for a checkpoint that mixes several.
    set_config_dtype(partial / "config.json", files[0].plan.tensors[0].dtype)
    beside.write(partial)


def write_part(writer: FileWriter, part: Part, tensor: MegatronTensor, arch: ModelArchitecture) -> int:
    """Write what a file holds of a Megatron tensor; how many bytes that is.

    Raises:
        OSError: the file system refuses.
    """
    names = part.rule.source_names(part.place)
    return sum(
        writer.write(names[source], source_rows(part.rule, arch, source, tensor.dtype, tensor.read)) for source in part.sources
    )


def write_hf_directory(
    save_dir: Path,
    assets_dir: Path,
    arch: ModelArchitecture,
    read: Callable[[Rule, Place], MegatronTensor],
    dtypes: Mapping[str, torch.dtype],
    *,
    max_shard_bytes: float = DEFAULT_SHARD_BYTES,
    beside: Beside = NOTHING_ELSE,
) -> None:
    """Write safetensors shards, their index, config and tokenizer, in one process; the directory appears when all of it is there.

    Args:
        save_dir: missing or empty.
        assets_dir: holds config.json and the tokenizer.
        arch: the model.
        read: gives a tensor of the model; each is un-merged before the next is asked for.
        dtypes: dtype to store each Megatron name in.
        max_shard_bytes: size at which another file is begun.
        beside: what else belongs to the model.

    Raises:
        ConversionError: ``save_dir`` holds something, or there is no config.json.
        OSError: the file system refuses; nothing is left of ``save_dir``.
    """
    check_output_directory(save_dir, "--save-hf")
    files = plan_model_files(arch, dtypes, max_shard_bytes, {})
    with new_directory(save_dir) as directory:
        begin_hf_directory(save_dir, directory, assets_dir, files, beside)
        num_bytes = sum(tensor.num_bytes for file in files for tensor in file.plan.tensors)
        with progress_bar(f"writing {save_dir}", num_bytes, "B", shown=True) as bar:
            for file in files:
                with FileWriter(directory, file.plan) as writer:
                    for part in file.parts:
                        bar.update(write_part(writer, part, read(part.rule, part.place), arch))
                    writer.finish()
        write_index(directory, [file.plan for file in files])
