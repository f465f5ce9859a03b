"""The generator's directory: what is in it, the same bytes from the same seed, whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from megatron_rmipo.embedded.generate import make_inputs
from megatron_rmipo.errors import ConfigError

ROOT = Path(__file__).parents[2]
SIZES = {"num_supervised": 31, "num_train": 23, "num_held_out": 11}


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs") / "deep" / "here"
    make_inputs(directory, seed=7, **SIZES)
    return directory


def test_rows_in_the_form_the_data_tool_reads(made: Path) -> None:
    for name, count in (("sft", 31), ("train", 23), ("heldout", 11)):
        rows = [json.loads(line) for line in (made / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == count
        assert all(set(row) == {"prompt", "chosen", "rejected", "kind"} for row in rows)


def test_the_model_runs_in_transformers_with_its_tokenizer(made: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(made / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(made / "model")
    assert model.config.vocab_size == len(tokenizer)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert model.config.num_attention_heads % 2 == model.config.num_key_value_heads % 2 == model.config.num_hidden_layers % 2 == 0
    assert not model.config.tie_word_embeddings
    assert model.dtype is torch.float32
    logits = model(torch.tensor([tokenizer("How do I move it?")["input_ids"]])).logits
    assert torch.isfinite(logits).all()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(made: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    make_inputs(tmp_path / "again", seed=7, **SIZES)
    assert contents(tmp_path / "again") == contents(made)
    assert torch.equal(torch.get_rng_state(), state)
    make_inputs(tmp_path / "other", seed=8, **SIZES)
    other, first = contents(tmp_path / "other"), contents(made)
    assert all(other[name] != first[name] for name in ("train.jsonl", "sft.jsonl", "heldout.jsonl", "model/model.safetensors"))


def test_a_directory_with_content_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "keep").write_text("mine")
    with pytest.raises(ConfigError, match=r"--output .* is not empty"):
        make_inputs(tmp_path, seed=1, **SIZES)
    assert contents(tmp_path) == {"keep": b"mine"}


def test_an_interrupted_run_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("megatron_rmipo.embedded.generate.save_model", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_inputs(tmp_path / "inputs", seed=7, **SIZES)
    assert not (tmp_path / "inputs").exists()
    make_inputs(tmp_path / "inputs", seed=7, **SIZES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs"]


def test_the_script_people_run(tmp_path: Path) -> None:
    command = [sys.executable, "examples/embedded/make_inputs.py", "--output", str(tmp_path / "inputs"), "--seed", "7"]
    sizes = ["--sft-rows", "31", "--train-pairs", "23", "--heldout-pairs", "11"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    first = subprocess.run([*command, *sizes], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    assert "heldout.jsonl" in first.stdout
    second = subprocess.run([*command, *sizes], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert "is not empty" in second.stderr
    assert "Traceback" not in second.stderr
