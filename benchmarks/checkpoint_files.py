"""Random checkpoints, and the folders in which ``bench_convert.py`` converts and copies them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from megatron_rmipo.checkpoint.convert import convert_hf_to_megatron, convert_megatron_to_hf
from megatron_rmipo.checkpoint.hf.output_files import FileWriter, TensorPlan, plan_files, write_index
from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.families.tensors import stored_tensors

TO_MEGATRON, TO_HF = DIRECTIONS = ("HF to Megatron", "Megatron to HF")


@dataclasses.dataclass(frozen=True)
class Folders:
    """The model as it was made, its Megatron form, and where a call under measurement writes.

    Attributes:
        hf, megatron, output: the folders.
        max_shard_bytes: size of a safetensors file.
    """

    hf: Path
    megatron: Path
    output: Path
    max_shard_bytes: float

    def source(self, direction: str) -> Path:
        """What ``direction`` reads."""
        return self.hf if direction == TO_MEGATRON else self.megatron

    def prepare(self, direction: str) -> None:
        """Bring about the state in which every call finds the disk and the page cache."""
        shutil.rmtree(self.output, ignore_errors=True)
        os.sync()
        buffer = bytearray(2**20)
        for path in files_in(self.source(direction)):
            with path.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass

    def convert(self, direction: str) -> None:
        """Convert into ``output`` and flush it."""
        if direction == TO_MEGATRON:
            convert_hf_to_megatron(self.hf, self.output)
        else:
            convert_megatron_to_hf(self.megatron, self.output, max_shard_bytes=self.max_shard_bytes)
        flush_files(self.output)

    def copy(self, direction: str) -> None:
        """Copy what ``direction`` reads into ``output`` and flush it."""
        source = self.source(direction)
        for path in files_in(source):
            target = self.output / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        flush_files(self.output)

    def check_round_trip(self) -> None:
        """Convert to Megatron, for all that follows, and back; compare every tensor as safetensors itself reads it.

        Raises:
            ConversionError: naming what came back otherwise.
        """
        convert_hf_to_megatron(self.hf, self.megatron)
        self.convert(TO_HF)
        before, after = dict(_tensors_in(self.hf)), dict(_tensors_in(self.output))
        if before.keys() != after.keys():
            raise ConversionError(f"Other tensors came back: {', '.join(sorted(before.keys() ^ after.keys()))}.")
        for name, path in before.items():
            with safe_open(path, framework="pt") as expected, safe_open(after[name], framework="pt") as found:
                pair = [file.get_tensor(name) for file in (expected, found)]
            # As integers, since no NaN equals another.
            if pair[0].dtype != pair[1].dtype or not torch.equal(*(tensor.view(torch.int16) for tensor in pair)):
                raise ConversionError(f"{name} did not come back as it was.")


def files_in(directory: Path) -> list[Path]:
    """Every file below a folder, sorted."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def flush_files(directory: Path) -> None:
    """Fsync every file below a folder."""
    for path in files_in(directory):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_config(directory: Path, sizes: Mapping[str, int]) -> None:
    """The config.json of a Llama of these sizes, in a new folder."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": sizes["hidden_size"],
        "intermediate_size": sizes["ffn_hidden_size"],
        "num_hidden_layers": sizes["num_layers"],
        "num_attention_heads": sizes["num_attention_heads"],
        "num_key_value_heads": sizes["num_query_groups"],
        "vocab_size": sizes["vocab_size"],
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def plan_weights(directory: Path) -> list[TensorPlan]:
    """The tensors, in bfloat16, that the config.json of a folder asks for.

    Raises:
        ConversionError: its sizes make no model.
    """
    arch = read_architecture(directory)
    return [TensorPlan(name, shape, torch.bfloat16) for name, (_, shape) in stored_tensors(arch).items()]


def write_random_weights(directory: Path, plan: Sequence[TensorPlan], max_shard_bytes: float, seed: int) -> None:
    """Every bit pattern: infinities and NaNs too must come back as they were."""
    generator = torch.Generator().manual_seed(seed)
    files = plan_files(plan, max_shard_bytes)
    for file in files:
        with FileWriter(directory, file) as writer:
            for tensor in file.tensors:
                bits = torch.randint(-(2**15), 2**15, tensor.shape, dtype=torch.int16, generator=generator)
                writer.write(tensor.name, [bits.view(torch.bfloat16)])
            writer.finish()
    write_index(directory, files)


def _tensors_in(directory: Path) -> Iterator[tuple[str, Path]]:
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            yield from ((name, path) for name in file.keys())  # noqa: SIM118, it is no mapping
