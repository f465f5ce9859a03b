"""An adapter and its base model, written as one model, bit for bit as PEFT merges them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_rmipo.checkpoint.hf.assets import copy_hf_assets, set_config_dtype
from megatron_rmipo.checkpoint.hf.checked_weights import open_weights
from megatron_rmipo.checkpoint.hf.output_files import FileWriter, TensorPlan, plan_files, write_index
from megatron_rmipo.checkpoint.hf.safetensors_files import WeightFiles
from megatron_rmipo.checkpoint.peft.reading import CONFIG_NAME, is_adapter, model_directory
from megatron_rmipo.checkpoint.whole_directories import check_output_directory, check_space, new_directory
from megatron_rmipo.command import progress_bar
from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.base import Rule
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.families.tensors import stored_tensors


def merge_adapter(
    adapter_dir: Path, save_dir: Path, *, base: Path | None = None, dtype: torch.dtype | None = None, max_shard_bytes: float = 5e9
) -> None:
    """Write the model that an adapter and its base model make, in one process that holds one weight at a time.

    Its numbers are those of PEFT's ``merge_and_unload`` of the base model, loaded in the dtype of its files, in which they are
    written, or in a wider one that is asked for.

    Args:
        adapter_dir: an adapter.
        save_dir: missing or empty.
        base: the base model; None: the directory that the adapter names.
        dtype: of the files; None: each tensor keeps its own.
        max_shard_bytes: size at which another file is begun.

    Raises:
        ConversionError: there is no adapter or no base model, they do not belong together, the model is not supported, or
            ``save_dir`` holds something.
    """
    if not is_adapter(adapter_dir):
        raise ConversionError(f"--load-adapter {adapter_dir} holds no adapter: there is no {CONFIG_NAME}, or a model is in it.")
    config_dir = model_directory(adapter_dir, base)
    arch = read_architecture(config_dir)
    files = open_weights(adapter_dir, arch, base)
    rules = stored_tensors(arch)
    plans = plan_files(
        [
            TensorPlan(name, shape, files.tensors[name].dtype if dtype is None or rule.is_buffer else dtype)
            for name, (rule, shape) in rules.items()
        ],
        max_shard_bytes,
    )
    check_output_directory(save_dir, "--save-hf")
    try:
        check_space(save_dir, sum(plan.num_bytes for plan in plans))
        with new_directory(save_dir) as directory:
            copy_hf_assets(config_dir, directory)
            set_config_dtype(directory / "config.json", plans[0].tensors[0].dtype)
            num_bytes = sum(tensor.num_bytes for plan in plans for tensor in plan.tensors)
            with progress_bar(f"writing {save_dir}", num_bytes, "B", shown=True) as bar:
                for plan in plans:
                    with FileWriter(directory, plan) as writer:
                        for tensor in plan.tensors:
                            bar.update(writer.write(tensor.name, _pieces(files, tensor, rules[tensor.name][0])))
                        writer.finish()
            write_index(directory, plans)
    except OSError as error:
        raise ConversionError(
            f"--save-hf {save_dir} cannot be written: {error}. Free some space or name another directory."
        ) from error


def _pieces(files: WeightFiles, tensor: TensorPlan, rule: Rule) -> Iterator[Tensor]:
    """A tensor whole, or of a stack of all experts' matrices each expert's."""
    if rule.is_stacked and len(tensor.shape) == 3:
        num_experts, num_lines, width = tensor.shape
        for expert in range(num_experts):
            lines = torch.empty((num_lines, width), dtype=tensor.dtype)
            files.read_lines(tensor.name, expert * num_lines, lines)
            yield lines
        return
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    files.read(tensor.name, 0, whole)
    yield whole
