"""The scripts people run: their commands are printed and parsed, and what cannot work is refused."""

import json
import shlex
from pathlib import Path

import pytest

from megatron_rmipo.training.validation import problems_without_model
from tests.examples.scripts import (
    LAPTOP,
    LLAMA,
    LORA,
    ROOT,
    calls,
    commands,
    environment,
    layout_of,
    own_inputs,
    run_script,
    trainings,
)

# Script -> tensor, pipeline and expert parallel size of the embedded example on two ranks, and of the real model on eight.
SCRIPTS = {
    LLAMA: ((2, 1, 1), (4, 1, 1)),
    LORA: ((2, 1, 1), (1, 1, 1)),
    "run_rmipo_mistral_7b.sh": ((2, 1, 1), (4, 1, 1)),
    "run_rmipo_qwen3_8b.sh": ((2, 1, 1), (4, 1, 1)),
    "run_rmipo_gemma3_12b.sh": ((2, 1, 1), (8, 1, 1)),
    "run_rmipo_llama3_70b.sh": ((1, 2, 1), (8, 1, 1)),
    "run_rmipo_qwen3_30b_a3b.sh": ((1, 1, 2), (1, 1, 8)),
}


def test_every_script_is_in_the_table() -> None:
    assert {*SCRIPTS, LAPTOP} == {path.name for path in (ROOT / "examples").glob("run_*.sh")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_prints_commands_that_parse_and_does_nothing(script: str, tmp_path: Path) -> None:
    output = run_script(script, environment(tmp_path, DRY_RUN="1", GPUS_PER_NODE="2"))
    assert "embedded example" in output
    assert calls(tmp_path) == []
    assert not (tmp_path / "work").exists()
    sft, rmipo = trainings(output)
    assert (sft.objective.objective, rmipo.objective.objective) == ("sft", "rmipo")
    for config in (sft, rmipo):
        assert problems_without_model(config) == []
        assert layout_of(config) == SCRIPTS[script][0]
    for command in commands(output):
        if command[1] != "-m":
            assert Path(command[1]).is_file(), command[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_own_inputs_train_with_the_papers_settings(script: str, tmp_path: Path) -> None:
    variables = environment(tmp_path, DRY_RUN="1", HF_MODEL="/models/m", DATA="pairs.jsonl", GPUS_PER_NODE="8")
    (config,) = trainings(run_script(script, variables))
    assert problems_without_model(config) == []
    assert config.objective.options["beta"] == 2.0
    assert (config.objective.options["gamma_min"], config.objective.options["gamma_max"]) == (0.3, 1.6)
    assert config.objective.options["preset"] == "per_token"
    assert (config.training.global_batch_size, config.data.seq_length, config.training.epochs) == (128, 2048, 1.0)
    assert (config.optimizer.optimizer, config.optimizer.lr_decay_style, config.optimizer.lr_warmup_fraction) == (
        "adam",
        "cosine",
        0.1,
    )
    times = 10 if config.lora.is_on else 1
    assert 3e-7 * times <= config.optimizer.lr <= 1e-6 * times
    assert config.model.bf16
    assert config.parallel.use_distributed_optimizer
    assert layout_of(config) == SCRIPTS[script][1]


def test_the_script_for_a_laptop_names_its_model_and_holds_out_a_fifth(tmp_path: Path) -> None:
    assert "DATA: give preference pairs" in run_script(LAPTOP, environment(tmp_path, HF_MODEL="m"), expect=1)
    output = run_script(LAPTOP, environment(tmp_path, DRY_RUN="1", DATA="pairs.jsonl"), "--preset", "paper")
    model = tmp_path / "work" / "model"
    # An option of hf takes one value: a second word would be the only file to download.
    download = f"hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir {model}.incomplete --exclude onnx/*"
    assert download.split() in [shlex.split(line) for line in output.splitlines() if line.startswith("hf ")]
    assert f"mv {model}.incomplete {model}" in output
    (preprocessing,) = [command for command in commands(output) if command[1].endswith("preprocess_preferences.py")]
    assert preprocessing[preprocessing.index("--seq-length") :][:4] == ["--seq-length", "256", "--overlong", "drop"]
    (config,) = trainings(output)
    assert problems_without_model(config) == []
    assert config.objective.options["preset"] == "paper"
    assert (config.data.split, config.parallel.tensor_model_parallel_size) == ("80,20", 1)
    assert (config.training.train_iters, config.training.global_batch_size, config.training.eval_pairs) == (12, 8, 64)
    # With a model of one's own nothing is downloaded.
    output = run_script(
        LAPTOP, environment(tmp_path, DRY_RUN="1", DATA="pairs.jsonl", HF_MODEL="/models/m", VALID_DATA="v.jsonl")
    )
    assert "hf download" not in output
    assert trainings(output)[0].data.valid_data_path == [str(tmp_path / "work" / "data" / "valid")]


def test_the_script_for_a_laptop_says_where_the_downloading_command_is_from(tmp_path: Path) -> None:
    variables = environment(tmp_path, DATA="pairs.jsonl")
    variables["PATH"] = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    assert "hf, the command of the package huggingface_hub, is not on the PATH" in run_script(LAPTOP, variables, expect=1)
    assert calls(tmp_path) == []


def test_the_layout_follows_the_variables(tmp_path: Path) -> None:
    layout = {"GPUS_PER_NODE": "2", "NUM_NODES": "3", "NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "6001", "PP": "2"}
    output = run_script(LLAMA, environment(tmp_path, DRY_RUN="1", HF_MODEL="m", DATA="d", **layout), "--epochs", "2")
    (line,) = [command for command in commands(output) if "megatron_rmipo.launch" in command]
    words = " ".join(line)
    assert "--nproc-per-node 2 --nnodes 3 --node-rank 1 --master-addr first --master-port 6001" in words
    (config,) = trainings(output)
    assert (config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size) == (2, 2)
    assert config.training.epochs == 2.0


def test_one_of_model_and_data_alone_is_refused(tmp_path: Path) -> None:
    assert "go together" in run_script(LLAMA, environment(tmp_path, DATA="pairs.jsonl"), expect=1)
    assert calls(tmp_path) == []


def test_a_model_directory_without_config_is_refused(tmp_path: Path) -> None:
    variables = environment(tmp_path, HF_MODEL=str(tmp_path), DATA="pairs.jsonl")
    assert "no config.json" in run_script(LLAMA, variables, expect=1)
    assert calls(tmp_path) == []


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"GPUS_PER_NODE": "two"}, "GPUS_PER_NODE=two: a whole number is needed"),
        ({"GPUS_PER_NODE": "0"}, "at least 1"),
        ({"SEQ_LENGTH": "2k"}, "SEQ_LENGTH=2k: a whole number is needed"),
        ({"NUM_NODES": "2", "NODE_RANK": "1"}, "MASTER_ADDR"),
        ({"NUM_NODES": "2", "MASTER_ADDR": "first"}, "NODE_RANK"),
        ({"NODE_RANK": "1"}, "numbered from 0 to 0"),
        ({"SFT_DATA": "gs://bucket/sft.jsonl"}, "SFT_DATA=gs://bucket/sft.jsonl: object stores"),
        ({"HF_MODEL": "meta-llama/Llama-3.2-1B"}, "hf download meta-llama/Llama-3.2-1B --local-dir models/Llama-3.2-1B"),
    ],
)
def test_what_cannot_work_is_answered_with_the_remedy(tmp_path: Path, variables: dict[str, str], said: str) -> None:
    message = run_script(LLAMA, environment(tmp_path, **{**own_inputs(tmp_path), **variables}), expect=1)
    assert said in message
    assert len(message.splitlines()) < 5
    assert calls(tmp_path) == []


def test_paths_are_read_from_where_the_script_is_started(tmp_path: Path) -> None:
    own_inputs(tmp_path)
    variables = environment(tmp_path, HF_MODEL="model", DATA="pairs.jsonl", WORK_DIR="here/work")
    (tmp_path / "stand").mkdir()
    for folder in ("model", "pairs.jsonl"):
        (tmp_path / folder).rename(tmp_path / "stand" / folder)
    run_script(LLAMA, variables, cwd=tmp_path / "stand")
    assert (tmp_path / "stand/here/work/hf/config.json").is_file()
    assert json.loads((tmp_path / "stand/here/work/.stages/preprocess-train.json").read_text())["inputs"]["data"]["files"]


def test_an_installation_that_lacks_a_package_or_is_too_old_is_told(tmp_path: Path) -> None:
    variables = environment(tmp_path, **own_inputs(tmp_path))
    program = "import sys; from megatron_rmipo import entry; {}; sys.exit(entry.start('megatron_rmipo.entry'))"
    for change, said in (
        ("entry.NEEDED += ('nosuch.package', 'neither')", "nosuch.package, neither. Run 'make venv'"),
        ("entry.OLDEST_PYTHON = (4, 1)", "Python 4.1 or later is needed"),
    ):
        program_file = tmp_path / "bin" / "python"
        program_file.write_text(f'#!/bin/sh\nexec "$REAL_PYTHON" -c "{program.format(change)}"\n')
        message = run_script(LLAMA, variables, expect=1)
        assert said in message
        assert len(message.splitlines()) == 1
