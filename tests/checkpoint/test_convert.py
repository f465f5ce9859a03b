"""Offline conversion: bit-exact round trips, faults of the input, memory."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_rmipo.checkpoint import convert, hf_to_megatron_cli, megatron_to_hf_cli
from megatron_rmipo.checkpoint.convert import convert_hf_to_megatron, convert_megatron_to_hf
from megatron_rmipo.checkpoint.hf import assets
from megatron_rmipo.checkpoint.megatron.directory import latest_complete_iteration
from megatron_rmipo.errors import CheckpointError, ConversionError
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.families.tensors import num_parameters
from tests.checkpoint.models import KINDS, SPARSE_KINDS, write_hf_model


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        assert torch.equal(tensor, found[name]), name


# What is copied does not know its dtype: half of the kinds have the one, half the other.
@pytest.mark.parametrize(("kind", "dtype"), list(zip(KINDS, itertools.cycle([torch.float32, torch.bfloat16]), strict=False)))
def test_round_trip_is_bit_exact(tmp_path: Path, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pieces smaller than a tensor, with odd ends, as a large model has them.
    monkeypatch.setattr("megatron_rmipo.checkpoint.hf.safetensors_files.PIECE_BYTES", 1000)
    source = write_hf_model(tmp_path / "in", kind, dtype=dtype, max_shard_size="90KB")
    convert_hf_to_megatron(source, tmp_path / "checkpoint")
    assert latest_complete_iteration(tmp_path / "checkpoint") == "release"
    convert_megatron_to_hf(tmp_path / "checkpoint", tmp_path / "out", max_shard_bytes=60000)
    assert_same(tensors(source), tensors(tmp_path / "out"))
    assert num_parameters(read_architecture(source)) == sum(tensor.numel() for tensor in tensors(source).values())
    _, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    assert (source / "config.json").read_text() == (tmp_path / "out" / "config.json").read_text()
    assert (tmp_path / "out" / "generation_config.json").is_file()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert max(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) < 70000


def test_dtype_is_chosen_and_told(tmp_path: Path) -> None:
    source = write_hf_model(tmp_path / "in", "llama31")
    convert_hf_to_megatron(source, tmp_path / "checkpoint")
    convert_megatron_to_hf(tmp_path / "checkpoint", tmp_path / "out", dtype="bfloat16")
    assert_same({name: tensor.bfloat16() for name, tensor in tensors(source).items()}, tensors(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_head_stored_beside_a_tied_embedding(tmp_path: Path) -> None:
    source = write_hf_model(tmp_path / "in", "llama32_tied")
    stored = tensors(source)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, source / "model.safetensors")
    convert_hf_to_megatron(source, tmp_path / "checkpoint")
    stored["lm_head.weight"][5, 3] += 1
    save_file(stored, source / "model.safetensors")
    with pytest.raises(ConversionError, match=r"lm_head\.weight differs"):
        convert_hf_to_megatron(source, tmp_path / "other")


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_experts_stored_together_are_read_as_those_stored_apart(tmp_path: Path, kind: str) -> None:
    source = write_hf_model(tmp_path / "in", kind)
    model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "joined", save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in tensors(tmp_path / "joined"))
    convert_hf_to_megatron(tmp_path / "joined", tmp_path / "checkpoint")
    convert_megatron_to_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert_same(tensors(source), tensors(tmp_path / "out"))


def test_missing_experts_are_named_on_one_screen(tmp_path: Path) -> None:
    source = write_hf_model(tmp_path / "in", "qwen3_moe")
    stored = tensors(source)
    for name in [name for name in stored if ".experts.7." in name or name.endswith("layers.3.mlp.experts.2.up_proj.weight")]:
        del stored[name]
    save_file(stored, source / "model.safetensors")
    with pytest.raises(ConversionError) as caught:
        convert_hf_to_megatron(source, tmp_path / "checkpoint")
    message = str(caught.value)
    assert "missing (7): model.layers.1.mlp.experts.7.down_proj.weight, model.layers.1.mlp.experts.7.gate_proj.weight" in message
    assert "model.layers.3.mlp.experts.2.up_proj.weight" in message
    assert len(message) < 1000


def _truncate(source: Path) -> None:
    with (source / "model.safetensors").open("r+b") as stream:
        stream.truncate(100000)


def _pointer(source: Path) -> None:
    (source / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def _index_of_nothing(source: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def _shifted_offsets(source: Path) -> None:
    path = source / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["model.norm.weight"]["data_offsets"][0] -= 4
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def _changed(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(source: Path) -> None:
        stored = tensors(source)
        change(stored)
        save_file(stored, source / "model.safetensors")

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_truncate, "truncated"),
        (_pointer, "too short for the header"),
        (_shifted_offsets, r"damaged header: model\.norm\.weight, F32 \[48\]"),
        (_index_of_nothing, r"model-00001-of-00002\.safetensors"),
        (lambda source: (source / "model.safetensors").unlink(), "has neither"),
        (_changed(lambda stored: stored.pop("model.norm.weight")), r"missing \(1\): model\.norm\.weight"),
        (_changed(lambda stored: stored.update(extra=torch.ones(2))), r"not used \(1\): extra"),
        (_changed(lambda stored: stored.update({"model.norm.weight": torch.ones(5)})), r"shape \[5\].*\[48\]"),
    ],
)
def test_damaged_weights_are_named(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    source = write_hf_model(tmp_path / "in", "llama2")
    spoil(source)
    with pytest.raises(ConversionError, match=message):
        convert_hf_to_megatron(source, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_output_that_holds_something_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_hf_model(tmp_path / "in", "llama2")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    assert hf_to_megatron_cli.main(["--hf-model", str(source), "--save", str(tmp_path / "out")]) == 1
    assert "holds notes" in capsys.readouterr().err
    assert hf_to_megatron_cli.main(["--hf-model", str(source), "--save", str(tmp_path / "checkpoint")]) == 0
    assert megatron_to_hf_cli.main(["--load", str(tmp_path / "checkpoint"), "--save-hf", str(tmp_path / "out")]) == 1
    assert "holds notes" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes"]


def test_half_written_checkpoint_is_refused(tmp_path: Path) -> None:
    convert_hf_to_megatron(write_hf_model(tmp_path / "in", "llama2"), tmp_path / "checkpoint")
    with (tmp_path / "checkpoint" / "release" / "__0_1.distcp").open("r+b") as stream:
        stream.truncate(5000)
    with pytest.raises(CheckpointError, match=r"__0_1\.distcp has 5000 bytes"):
        convert_megatron_to_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_space_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_hf_model(tmp_path / "in", "llama2")
    convert_hf_to_megatron(source, tmp_path / "checkpoint")
    monkeypatch.setattr(assets.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    for action in (
        lambda: convert_hf_to_megatron(source, tmp_path / "a"),
        lambda: convert_megatron_to_hf(tmp_path / "checkpoint", tmp_path / "b"),
    ):
        with pytest.raises(ConversionError, match=r"MiB are needed, and 0\.0 MiB are free"):
            action()
    assert not list(tmp_path.glob("a/*")) + list(tmp_path.glob("b*"))


def test_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    source = write_hf_model(tmp_path / "in", "llama2")
    convert_hf_to_megatron(source, tmp_path / "checkpoint")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30000, before[1]))
    try:
        with pytest.raises(ConversionError, match="cannot be written"):
            convert_hf_to_megatron(source, tmp_path / "a")
        with pytest.raises(ConversionError, match="cannot be written"):
            convert_megatron_to_hf(tmp_path / "checkpoint", tmp_path / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob("a/*")) + list(tmp_path.glob("b*"))


_MEASURE = """
import sys
from megatron_rmipo.checkpoint import hf_to_megatron_cli, megatron_to_hf_cli
def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
tool = {"in": hf_to_megatron_cli, "out": megatron_to_hf_cli}[sys.argv[1]]
source_flag, source, target_flag, target, small = sys.argv[2:]
# A small conversion first: what it imports is the program's size, not the checkpoint's.
assert tool.main([source_flag, small, target_flag, target + "-small"]) == 0
before = peak()
assert tool.main([source_flag, source, target_flag, target]) == 0
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_conversion_needs_less_than_a_quarter_of_the_checkpoint(tmp_path: Path) -> None:
    size = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16}
    source = write_hf_model(tmp_path / "in", "llama31", dtype=torch.bfloat16, vocab_size=32003, num_key_value_heads=4, **size)
    small = write_hf_model(tmp_path / "small", "llama31")
    num_bytes = (source / "model.safetensors").stat().st_size
    assert num_bytes > 380e6

    def measure(*arguments: str | Path) -> int:
        command = [sys.executable, "-W", "ignore", "-c", _MEASURE, *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        return int(run.stdout.split()[-1])

    checkpoint = tmp_path / "checkpoint"
    assert measure("in", "--hf-model", source, "--save", checkpoint, small) < num_bytes / 4
    shutil.rmtree(source)
    assert measure("out", "--load", checkpoint, "--save-hf", tmp_path / "out", f"{checkpoint}-small") < num_bytes / 4


def test_converters_need_no_megatron_core() -> None:
    code = f"import sys; import {convert.__name__}; sys.exit(any(name.split('.')[0] == 'megatron' for name in sys.modules))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        ).returncode
        == 0
    )
