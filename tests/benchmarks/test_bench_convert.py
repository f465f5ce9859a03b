"""The conversion benchmark: its figures, what it checks before it times, what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import bench_convert, checkpoint_files
from benchmarks.bench_convert import Conversion
from benchmarks.checkpoint_files import DIRECTIONS, TO_HF, TO_MEGATRON, Folders, files_in, write_config
from benchmarks.report import read_rows
from megatron_rmipo.errors import ConversionError

SMALL = {
    "num_layers": 2,
    "hidden_size": 24,
    "ffn_hidden_size": 40,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "vocab_size": 203,
}
# Embedding and head; a layer's q, k and v, o, three of the feed-forward and two norms; the last norm. Two bytes each.
SMALL_BYTES = 2 * (2 * 203 * 24 + 2 * (24 * 24 + 2 * 8 * 24 + 24 * 24 + 3 * 40 * 24 + 2 * 24) + 24)
FLAGS = [text for name, size in SMALL.items() for text in (f"--{name.replace('_', '-')}", str(size))]


def run(tmp_path: Path, *arguments: str) -> int:
    options = ["--csv", str(tmp_path / "a.csv"), "--directory", str(tmp_path), "--repeats", "2", "--json", *FLAGS, *arguments]
    return bench_convert.main(options)


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    made = Folders(tmp_path / "hf", tmp_path / "megatron", tmp_path / "output", 9000)
    write_config(made.hf, SMALL)
    checkpoint_files.write_random_weights(made.hf, checkpoint_files.plan_weights(made.hf), made.max_shard_bytes, seed=3)
    return made


def conversion(seconds: float, copy_seconds: float, num_bytes: int = 500_000_000, peak_bytes: int = 0) -> Conversion:
    return Conversion.of(TO_HF, num_bytes, [(seconds, 1.0)] * 3, [(copy_seconds, 0.5)] * 3, peak_bytes)


def test_figures_by_hand() -> None:
    times = [(2.0, 3.0), (4.0, 3.5), (5.0, 4.0)]
    copies = [(1.0, 0.1), (4.0, 0.2), (4.0, 0.3)]
    row = Conversion.of(TO_HF, 8_000_000_000, times, copies, peak_bytes=1_000_000_000).row()
    assert (row["seconds_p50"], row["cpu_seconds_p50"], row["copy_seconds_p50"], row["copy_cpu_seconds_p50"]) == (
        4.0,
        3.5,
        4.0,
        0.2,
    )
    # Of each turn: 1/2, 4/4, 4/5. Not the ratio of the medians, which is 1.
    assert row["speed_over_copy_p50"] == pytest.approx(0.8)
    assert (row["gb_per_second"], row["copy_gb_per_second"], row["memory_over_size"]) == (2.0, 2.0, 0.125)


def test_goals_are_for_large_checkpoints() -> None:
    slow, large = conversion(2.0, 1.5, peak_bytes=125_000_000), conversion(2.0, 1.7, peak_bytes=126_000_000)
    assert [goal.reached for goal in bench_convert.goals([slow, large])] == [False, True, True, False]
    assert bench_convert.goals([conversion(2.0, 1.0, num_bytes=399_000_000)]) == []


@pytest.mark.slow
def test_runs_and_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["direction"] for row in rows] == list(DIRECTIONS)
    for row in rows:
        assert row["num_bytes"] == SMALL_BYTES
        assert row["peak_bytes"] >= 0
        assert row["startup_cpu_seconds"] > 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    assert [line["hidden_size"] for line in read_rows(tmp_path / "a.csv")] == ["24", "24"]


def test_round_trip_through_several_files_with_every_bit_pattern(folders: Folders) -> None:
    folders.check_round_trip()
    assert len(list(folders.hf.glob("*.safetensors"))) > 2
    stored = {name: tensor for path in folders.hf.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert stored["model.embed_tokens.weight"].isnan().any()


def test_another_bit_is_told(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = checkpoint_files.convert_megatron_to_hf

    def spoil(load_dir: Path, save_dir: Path, *, max_shard_bytes: float) -> None:
        convert(load_dir, save_dir, max_shard_bytes=max_shard_bytes)
        path = next(
            path for path in files_in(save_dir) if path.suffix == ".safetensors" and "model.norm.weight" in load_file(path)
        )
        tensors = load_file(path)
        tensors["model.norm.weight"].view(torch.int16)[5] ^= 1
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint_files, "convert_megatron_to_hf", spoil)
    with pytest.raises(ConversionError, match=r"model\.norm\.weight did not come back"):
        folders.check_round_trip()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_copy_takes_every_file_that_the_conversion_reads(folders: Folders, direction: str) -> None:
    folders.check_round_trip()
    folders.prepare(direction)
    assert not folders.output.exists()
    folders.copy(direction)
    source = folders.hf if direction == TO_MEGATRON else folders.megatron
    expected = {path.relative_to(source): path.read_bytes() for path in files_in(source)}
    assert {path.relative_to(folders.output): path.read_bytes() for path in files_in(folders.output)} == expected
    assert any(path.suffix == (".safetensors" if direction == TO_MEGATRON else ".distcp") for path in expected)


def test_disk_without_room_is_told_before_weights_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_convert.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    monkeypatch.setattr(bench_convert, "write_random_weights", lambda *arguments: pytest.fail("weights were made"))
    assert run(tmp_path) == 1
    assert "MB free; a model of 0 MB" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_make_no_model_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--num-query-groups", "4") == 1
    assert "num_attention_heads 6 is not a multiple of num_key_value_heads 4" in capsys.readouterr().err
    assert not (tmp_path / "a.csv").exists()


def test_every_field_of_times_is_in_a_row() -> None:
    row = conversion(1.0, 1.0).row()
    for field in dataclasses.fields(Conversion):
        assert field.name in row or f"{field.name}_p50" in row
