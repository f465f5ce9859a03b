"""Writing a Hugging Face model directory from Megatron tensors that arrive one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_rmipo.checkpoint.hf.assets import copy_hf_assets, set_config_dtype
from megatron_rmipo.checkpoint.hf.safetensors_files import ShardedWriter, TensorPlan
from megatron_rmipo.checkpoint.hf.shards import source_rows
from megatron_rmipo.checkpoint.whole_directories import check_output_directory, check_space, new_directory
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Place, Rule
from megatron_rmipo.families.tensors import source_shapes, tensors_of

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


def dtype_to_store(rule: Rule, dtype: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """The dtype a tensor is written in: the one asked for, if any; what only steers a router stays as precise as it is."""
    return dtype if asked is None or rule.is_buffer else asked


def write_hf_directory(
    save_dir: Path,
    assets_dir: Path,
    arch: ModelArchitecture,
    tensors: Iterable[MegatronTensor],
    dtypes: Mapping[str, torch.dtype],
    *,
    max_shard_bytes: float = DEFAULT_SHARD_BYTES,
) -> None:
    """Write safetensors shards, their index, config and tokenizer; the directory appears when all of it is there.

    Args:
        save_dir: missing or empty.
        assets_dir: holds config.json and the tokenizer.
        arch: the model.
        tensors: in the order of :func:`megatron_rmipo.checkpoint.hf.mappings.tensors_of`; each is un-merged before the next is
            asked for.
        dtypes: dtype to store each Megatron name in.
        max_shard_bytes: size at which another file is begun.

    Raises:
        ConversionError: ``save_dir`` holds something, or there is no config.json.
        OSError: the file system refuses; nothing is left of ``save_dir``.
    """
    check_output_directory(save_dir, "--save-hf")
    plan = [
        TensorPlan(name, shape, dtypes[rule.megatron])
        for rule, place in tensors_of(arch)
        for name, shape in zip(rule.source_names(place), source_shapes(rule, arch), strict=True)
    ]
    check_space(save_dir, sum(tensor.num_bytes for tensor in plan))
    with new_directory(save_dir) as directory:
        copy_hf_assets(assets_dir, directory)
        # One dtype is told in the config; the embedding speaks for a checkpoint that mixes several.
        set_config_dtype(directory / "config.json", plan[0].dtype)
        with ShardedWriter(directory, plan, max_shard_bytes) as writer:
            for tensor in tensors:
                for source, name in enumerate(tensor.rule.source_names(tensor.place)):
                    writer.write(name, source_rows(tensor.rule, arch, source, tensor.dtype, tensor.read))
            writer.finish()
