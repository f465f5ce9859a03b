from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_rmipo.data.preparing import preprocess_cli
from megatron_rmipo.data.preparing.inspect_cli import BOUNDARY, histogram, main
from tests.data.tokenizers import save_byte_bpe, save_sentencepiece


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inspect")
    model = save_sentencepiece(directory / "small.model")
    rows = [{"prompt": f"Why {i}?", "chosen": f"Because of {i}.", "rejected": "No idea " * (i + 1)} for i in range(5)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--input", str(directory / "rows.jsonl"), "--tokenizer-model", str(model), "--chat-template", "mistral"]
    assert preprocess_cli.main([*flags, "--output-prefix", str(directory / "pairs")]) == 0
    return directory / "pairs"


def test_pairs_are_shown_with_the_boundary_and_lengths(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(prefix), "2", "--start", "1"]) == 0
    out = capsys.readouterr().out
    assert f"--- prompt\n<s>[INST] Why 1? [/INST]{BOUNDARY}\n--- chosen\n{BOUNDARY} Because of 1. </s>\n" in out
    assert "=== pair 2:" in out
    assert "=== pair 0:" not in out
    assert "5 pairs" in out
    assert out.count("#") > 40


def test_supervised_rows_are_shown_without_a_rejected_response(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_sentencepiece(tmp_path / "small.model")
    rows = [{"prompt": f"Why {i}?", "response": f"Because of {i}."} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--input", str(tmp_path / "rows.jsonl"), "--tokenizer-model", str(model), "--chat-template", "mistral"]
    assert preprocess_cli.main([*flags, "--output-prefix", str(tmp_path / "rows")]) == 0
    capsys.readouterr()
    assert main([str(tmp_path / "rows"), "2", "--ids"]) == 0
    out = capsys.readouterr().out
    assert "=== supervised row 1: prompt " in out
    assert f"--- prompt\n<s>[INST] Why 1? [/INST]{BOUNDARY}\n--- chosen\n{BOUNDARY} Because of 1. </s>\n" in out
    assert "rows: 3 supervised rows, " in out
    assert "prompt with the response, tokens" in out
    assert "rejected, tokens" not in out
    assert "rejected ids" not in out


def test_unpaired_rows_are_shown_with_their_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_sentencepiece(tmp_path / "small.model")
    rows = [{"prompt": f"Why {i}?", "completion": f"Because of {i}.", "label": i == 1} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--input", str(tmp_path / "rows.jsonl"), "--tokenizer-model", str(model), "--chat-template", "mistral"]
    assert preprocess_cli.main([*flags, "--output-prefix", str(tmp_path / "rows")]) == 0
    capsys.readouterr()
    assert main([str(tmp_path / "rows"), "3", "--ids"]) == 0
    out = capsys.readouterr().out
    first, second, third = out.split("=== unpaired row ")[1:]
    assert first.startswith("0 (undesirable): prompt ")
    assert second.startswith("1 (desirable): prompt ")
    assert f"--- prompt\n<s>[INST] Why 0? [/INST]{BOUNDARY}\n--- rejected\n{BOUNDARY} Because of 0. </s>\nprompt ids: 1 " in first
    assert "chosen" not in first
    assert f"--- prompt\n<s>[INST] Why 1? [/INST]{BOUNDARY}\n--- chosen\n{BOUNDARY} Because of 1. </s>\nprompt ids: 1 " in second
    assert "rejected" not in second
    assert "rows: 3 unpaired rows, " in third
    assert "desirable 1, undesirable 2\n" in third
    sections = third.split("tokens (mean ")
    assert [sum(int(line.split()[-1]) for line in section.splitlines() if "#" in line) for section in sections] == [0, 3, 1, 2, 3]
    assert "prompt with the response, tokens" in third


def test_long_texts_and_ids(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{prefix}.bin", "1", "--start", "4", "--max-chars", "20", "--ids"]) == 0
    out = capsys.readouterr().out
    assert "characters ...]" in out
    assert "prompt ids: 1 " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["1", "--start", "5"], "has pairs 0 to 4"), (["1", "--tokenizer-model", "absent.model"], "no such tokenizer")],
)
def test_a_mistake_is_one_message(arguments: list[str], message: str, prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(prefix), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_another_tokenizer_is_refused(prefix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(prefix), "--tokenizer-model", str(save_byte_bpe(tmp_path))]) == 1
    assert "was made with another tokenizer" in capsys.readouterr().err
    assert main([str(tmp_path / "nothing")]) == 1
    assert "nothing.json: not found" in capsys.readouterr().err


def test_a_histogram_counts_every_value_once() -> None:
    values = np.random.default_rng(3).integers(1, 500, 777).astype(np.int32)
    lines = histogram(values).splitlines()
    assert sum(int(line.split()[-1]) for line in lines) == 777
    assert histogram(np.array([1], dtype=np.int32)).split() == ["1", "-", "1", "#" * 40, "1"]
