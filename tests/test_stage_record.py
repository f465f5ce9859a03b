"""What a stage was made from is known by its contents."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_rmipo import stage_record


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("one row\n")
    return path


def record(tmp_path: Path, *flags: str) -> int:
    return stage_record.main([str(tmp_path / "stage.json"), "--name=prepare", "--remedy=rm result", *flags])


def test_a_change_of_contents_is_refused_and_one_of_time_is_not(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (f"--input=data={data}", "--setting=--seq-length 7")
    assert record(tmp_path, *flags) == 0
    os.utime(data, (1, 1))
    assert record(tmp_path, *flags, "--made=result") == 0
    noted = json.loads((tmp_path / "stage.json").read_text())["inputs"]["data"]["files"][""]
    assert noted["time_ns"] == 10**9
    # As long as before, and written in the same moment: what is left then is the digest.
    data.write_text("two row\n")
    os.utime(data, (2, 2))
    before = (tmp_path / "stage.json").read_bytes()
    assert record(tmp_path, f"--input=data={data}", "--made=result") == 1
    said = capsys.readouterr().err.splitlines()
    assert said[1] == "  then: --seq-length 7"
    assert said[2].startswith(f"  then: data {data}: 8 bytes, sha256 {noted['sha256'][:12]}")
    assert said[3].startswith(f"  now:  data {data}: 8 bytes, sha256 ")
    assert said[-1].endswith("make it again: rm result")
    assert (tmp_path / "stage.json").read_bytes() == before
    # With its result gone it is made from what is there now.
    assert record(tmp_path, f"--input=data={data}") == 0
    assert (tmp_path / "stage.json").read_bytes() != before


def test_a_file_whose_size_and_time_are_those_noted_is_not_read(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = f"--input=data={data}"
    assert record(tmp_path, flags) == 0

    def refuse(*anything: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(stage_record.hashlib, "file_digest", refuse)
    assert record(tmp_path, flags, "--made=result") == 0


def test_a_tokenizer_does_not_depend_on_weights_and_a_model_does(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "README.md"):
        (model / name).write_text("before")
    assert record(tmp_path, f"--input=model={model}") == 0
    (model / "README.md").write_text("after")
    assert record(tmp_path, f"--input=model={model}", "--made=result") == 0
    assert record(tmp_path, f"--tokenizer=model={model}", "--made=result") == 1
    (tmp_path / "stage.json").unlink()
    assert record(tmp_path, f"--tokenizer=tokenizer={model}") == 0
    (model / "model.safetensors").write_text("other weights")
    assert record(tmp_path, f"--tokenizer=tokenizer={model}", "--made=result") == 0
    (model / "tokenizer.json").write_text("new")
    assert record(tmp_path, f"--tokenizer=tokenizer={model}", "--made=result") == 1


def test_a_change_before_is_told_as_such(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = str(tmp_path / "first.json")
    for text, code in (("one", 0), ("two", 1)):
        data.write_text(text)
        assert stage_record.main([first, "--name=first", f"--input=data={data}"]) == 0
        made = [] if code == 0 else ["--made=result"]
        assert record(tmp_path, f"--upstream=first={first}", *made) == code
    assert f"  now:  from first: data {data}: 3 bytes" in capsys.readouterr().err


def test_every_file_of_a_pattern_is_looked_at(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.csv", "deep/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def files(pattern: str) -> list[str]:
        return [os.path.relpath(name, tmp_path) for name in stage_record.describe_input(tmp_path / pattern, {}).get("files", {})]

    assert files("*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert files("**/*.jsonl") == ["a.jsonl", "b.jsonl", "deep/d.jsonl"]
    assert files("d*") == ["deep/d.jsonl"]
    assert stage_record.describe_input(tmp_path / "*.parquet", {}) == {"name": str(tmp_path / "*.parquet")}
