"""The scripts people run: their commands are printed, parsed and, with stand-ins for python and torchrun, run through."""

import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_rmipo.config.schema import Config
from megatron_rmipo.objectives.arguments import parse_arguments
from megatron_rmipo.training.validation import problems_without_model

ROOT = Path(__file__).parent.parent.parent
LAPTOP = "run_rmipo_smollm2.sh"
LLAMA = "run_rmipo_llama3_8b.sh"
# Script -> tensor, pipeline and expert parallel size of the embedded example on two ranks, and of the real model on eight.
SCRIPTS = {
    LLAMA: ((2, 1, 1), (4, 1, 1)),
    "run_rmipo_mistral_7b.sh": ((2, 1, 1), (4, 1, 1)),
    "run_rmipo_qwen3_8b.sh": ((2, 1, 1), (4, 1, 1)),
    "run_rmipo_gemma3_12b.sh": ((2, 1, 1), (8, 1, 1)),
    "run_rmipo_llama3_70b.sh": ((1, 2, 1), (8, 1, 1)),
    "run_rmipo_qwen3_30b_a3b.sh": ((1, 1, 2), (1, 1, 8)),
}
TWO_NODES = {"NUM_NODES": "2", "MASTER_ADDR": "first"}
# A stand-in notes how it was called and writes what the real command writes last.
STAND_IN = """#!/usr/bin/env bash
if [[ "$*" == "-m megatron_rmipo.stage_record "* || "$*" == "-m megatron_rmipo.entry" ]]; then exec "$REAL_PYTHON" "$@"; fi
echo "$(basename "$0") $*" >>"$CALLS"
if [[ "$*" == *"${FAILS:-no command}"* ]]; then exit 9; fi
if [[ "$*" == *"${HANGS:-no command}"* ]]; then
    # As the trainer: what it does at a signal takes a while, and the status is its own.
    for name in TERM INT; do trap "echo heard $name >>\"$CALLS\"; sleep 1; echo saved >>\"$CALLS\"; exit ${STATUS:-0}" $name; done
    echo hanging >>"$CALLS"
    while true; do sleep 0.1; done
fi
while (($#)); do
    case $1 in
        --output) mkdir -p "$2/model" && echo "{}" >"$2/model/config.json" ;;
        --output-prefix) mkdir -p "$(dirname "$2")" && echo "{}" >"$2.json" ;;
        --save) mkdir -p "$2" && echo "${STEP:-release}" >"$2/latest_checkpointed_iteration.txt" ;;
        --save-hf) if [[ -n "${INTERRUPTED:-}" ]]; then exit 75; fi; mkdir -p "$2" && echo "{}" >"$2/config.json" ;;
    esac
    shift
done
"""


def environment(tmp_path: Path, **variables: str) -> dict[str, str]:
    """What a script sees: a PATH with the stand-ins in front, and no variable of the scripts but those given."""
    tools = tmp_path / "bin"
    tools.mkdir(exist_ok=True)
    for name in ("python", "torchrun"):
        (tools / name).write_text(STAND_IN)
        (tools / name).chmod(stat.S_IRWXU)
    base = {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(tmp_path), "CALLS": str(tmp_path / "calls")}
    base["REAL_PYTHON"] = sys.executable
    return {**base, "WORK_DIR": str(tmp_path / "work"), **variables}


def run_script(name: str, variables: dict[str, str], *flags: str, expect: int = 0, cwd: Path | None = None) -> str:
    result = subprocess.run(
        ["bash", str(ROOT / "examples" / name), *flags],
        env=variables, cwd=cwd, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == expect, result.stdout + result.stderr
    return result.stdout + result.stderr


def start_script(variables: dict[str, str], *flags: str) -> subprocess.Popen[str]:
    # A shell cannot trap a signal that it was started to ignore, as it is where the tests themselves run in the background.
    command = ["env", "--default-signal=INT", "bash", str(ROOT / "examples" / LLAMA), *flags]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_until_called(tmp_path: Path, text: str) -> None:
    for _ in range(300):
        if (tmp_path / "calls").exists() and text in (tmp_path / "calls").read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"no {text!r} in the calls")


def calls(tmp_path: Path) -> list[str]:
    """The commands since the last look."""
    path = tmp_path / "calls"
    found = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def program_of(call: str) -> str:
    """The module or the file, from the project's root, that a call of Python runs."""
    words = call.split()
    return words[2] if words[1] == "-m" else str(Path(words[1]).relative_to(ROOT))


def commands(output: str) -> list[list[str]]:
    return [shlex.split(line) for line in output.splitlines() if line.startswith("python ")]


def trainings(output: str) -> list[Config]:
    """The configurations of the trainer's commands, as the trainer itself reads them."""
    lines = [command for command in commands(output) if "megatron_rmipo.launch" in command]
    return [parse_arguments(line[line.index("megatron_rmipo.train") + 1 :]) for line in lines]


def layout_of(config: Config) -> tuple[int, int, int]:
    parallel = config.parallel
    sizes = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.expert_model_parallel_size
    return sizes


def own_inputs(tmp_path: Path) -> dict[str, str]:
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_text("weights")
    for name in ("pairs", "sft"):
        (tmp_path / f"{name}.jsonl").write_text(f"a row of {name}")
    return {"HF_MODEL": str(model), "DATA": str(tmp_path / "pairs.jsonl")}


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
    assert 3e-7 <= config.optimizer.lr <= 1e-6
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


def test_stages_run_in_order_and_are_skipped_when_complete(tmp_path: Path) -> None:
    variables = environment(tmp_path)
    run_script(LLAMA, variables)
    programs = [program for program in map(program_of, calls(tmp_path)) if program != "megatron_rmipo.launch"]
    assert programs == [
        "examples/embedded/make_inputs.py",
        "tools/preprocess_preferences.py",
        "tools/preprocess_preferences.py",
        "tools/convert_hf_to_megatron.py",
        "tools/preprocess_preferences.py",
        "tools/summarize_run.py",
    ]
    output = run_script(LLAMA, variables)
    assert [*map(program_of, calls(tmp_path))] == ["tools/summarize_run.py"]
    assert output.count("already there") == 7


def test_only_what_is_missing_is_made_again(tmp_path: Path) -> None:
    variables = environment(tmp_path)
    run_script(LLAMA, variables)
    calls(tmp_path)
    (tmp_path / "work/data/valid.json").unlink()
    run_script(LLAMA, variables)
    assert ["valid" in call for call in calls(tmp_path)] == [True, False]


def test_a_result_of_other_settings_is_not_used_silently(tmp_path: Path) -> None:
    inputs = own_inputs(tmp_path)
    run_script(LLAMA, environment(tmp_path, **inputs))
    message = run_script(LLAMA, environment(tmp_path, **{**inputs, "DATA": "others.jsonl"}), expect=1)
    assert f"  then: data {tmp_path}/pairs.jsonl" in message
    assert "  now:  data others.jsonl (no file there)" in message
    assert "WORK_DIR" in message
    message = run_script(LLAMA, environment(tmp_path, **inputs), "--epochs", "3", expect=1)
    assert "other settings" in message
    # Another layout trains the same model.
    run_script(LLAMA, environment(tmp_path, **inputs, GPUS_PER_NODE="4"))


def test_an_interrupted_training_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    inputs = own_inputs(tmp_path)
    output = run_script(LLAMA, environment(tmp_path, **inputs, INTERRUPTED="1", STEP="40"), "--exit-interval", "40", expect=75)
    assert f"stopped before its end; step 40 is saved in {tmp_path}/work/rmipo; start this script again to go on" in output
    assert "failed" not in output
    first = calls(tmp_path)
    assert program_of(first[-1]) == "megatron_rmipo.launch"
    assert "--finetune" in first[-1]
    # Neither the layout nor when it stops is part of what is trained.
    output = run_script(LLAMA, environment(tmp_path, **inputs, GPUS_PER_NODE="4"))
    assert "goes on from the latest checkpoint" in output
    training, summary = calls(tmp_path)
    assert f"--load {tmp_path}/work/rmipo --save" in training
    assert "--finetune" not in training
    assert "summarize_run" in summary


def test_a_run_that_died_in_its_first_save_starts_anew(tmp_path: Path) -> None:
    variables = environment(tmp_path, **own_inputs(tmp_path))
    half = tmp_path / "work/rmipo/iter_0000010.incomplete"
    half.mkdir(parents=True)
    run_script(LLAMA, variables)
    assert "--finetune" in calls(tmp_path)[-2]
    assert not half.exists()


@pytest.mark.parametrize("interrupted", ["", "1"])
def test_other_settings_never_reuse_a_checkpoint(tmp_path: Path, interrupted: str) -> None:
    variables = environment(tmp_path, **own_inputs(tmp_path))
    run_script(LLAMA, variables | {"INTERRUPTED": interrupted, "STEP": "40"}, expect=75 if interrupted else 0)
    work = tmp_path / "work"
    # The printed remedy, followed by half: the finished checkpoint is still there and would be exported as the new result.
    shutil.rmtree(work / "hf", ignore_errors=True)
    calls(tmp_path)
    for _ in range(2):
        message = run_script(LLAMA, variables | {"LR": "1e-6"}, expect=1)
        assert f"rm -r {work}/rmipo {work}/hf" in message
        assert "--lr 1e-6" in next(line for line in message.splitlines() if line.startswith("  now:"))
        assert calls(tmp_path) == []
    shutil.rmtree(work / "rmipo")
    run_script(LLAMA, variables | {"LR": "1e-6"})
    assert "--finetune" in calls(tmp_path)[0]


def test_an_export_that_was_removed_is_made_again_from_the_checkpoint(tmp_path: Path) -> None:
    variables = environment(tmp_path, **own_inputs(tmp_path))
    run_script(LLAMA, variables)
    shutil.rmtree(tmp_path / "work/hf")
    calls(tmp_path)
    run_script(LLAMA, variables)
    assert f"--load {tmp_path}/work/rmipo --save" in calls(tmp_path)[0]


def test_a_training_from_other_results_is_not_used_silently(tmp_path: Path) -> None:
    inputs = own_inputs(tmp_path)
    variables = environment(tmp_path, **inputs, SFT_DATA=str(tmp_path / "sft.jsonl"))
    run_script(LLAMA, variables)
    work = tmp_path / "work"
    model, pairs = tmp_path / "model", tmp_path / "pairs.jsonl"
    # The same contents under other names, and written anew.
    moved = {
        "HF_MODEL": str(shutil.copytree(model, tmp_path / "other")),
        "DATA": str(shutil.copy(pairs, tmp_path / "moved.jsonl")),
    }
    assert run_script(LLAMA, variables | moved).count("already there") == 5
    (model / "config.json").write_text('{"changed": 1}')
    changed = variables
    # The remedies one after another, as a user follows them: each stage that stands on the changed one is refused in turn.
    for stage, remedy in (
        ("preprocess train", [*work.glob("data/train.*")]),
        ("convert the model", [work / "base"]),
        ("preprocess sft", [*work.glob("data/sft.*")]),
        ("train sft", [work / "sft", work / "sft-hf"]),
        ("train rmipo", [work / "rmipo", work / "hf"]),
    ):
        message = run_script(LLAMA, changed, expect=1)
        assert f"{stage}: " in message
        assert "made with other settings, or from something else" in message
        assert f"  then: {'from convert the model: ' if stage == 'train sft' else ''}" in message
        assert "config.json: 2 bytes, sha256 " in message
        assert "config.json: 14 bytes, sha256 " in message
        for path in remedy:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    run_script(LLAMA, changed)
    # Without the fine-tuning the preference training starts elsewhere.
    assert "train rmipo: " in run_script(LLAMA, changed | {"SFT_DATA": ""}, expect=1)


def test_the_flags_that_an_error_of_the_data_names_reach_the_tool(tmp_path: Path) -> None:
    variables = environment(tmp_path, **own_inputs(tmp_path), VALID_DATA=str(tmp_path / "sft.jsonl"))
    flags = {"DATA_FLAGS": "--columns prompt=question  --keep-ties", "VALID_FLAGS": "--format hh"}
    run_script(LLAMA, variables | flags)
    train, valid = [call for call in calls(tmp_path) if "preprocess_preferences.py" in call]
    assert "--columns prompt=question --keep-ties" in train
    assert "--format hh" in valid
    assert "made with other settings" in run_script(LLAMA, variables | flags | {"VALID_FLAGS": ""}, expect=1)


def test_the_number_of_workers_changes_no_data(tmp_path: Path) -> None:
    inputs = own_inputs(tmp_path)
    run_script(LLAMA, environment(tmp_path, **inputs, WORKERS="3"))
    assert "--workers 3" in calls(tmp_path)[0]
    assert "preprocess train: already there" in run_script(LLAMA, environment(tmp_path, **inputs, WORKERS="5"))


@pytest.mark.parametrize(("status", "expected"), [("75", 75), ("143", 75), ("3", 3)])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_launcher_and_its_status_comes_back(
    tmp_path: Path, sent: signal.Signals, status: str, expected: int
) -> None:
    script = start_script(environment(tmp_path, **own_inputs(tmp_path), HANGS="megatron_rmipo.train", STATUS=status))
    wait_until_called(tmp_path, "hanging")
    script.send_signal(sent)
    output, _ = script.communicate(timeout=30)
    assert script.returncode == expected, output
    assert calls(tmp_path)[-2:] == [f"heard {sent.name.removeprefix('SIG')}", "saved"]
    assert ("stopped by a signal; start this script again" in output) == (expected == 75)
    assert (tmp_path / "work/.stages/ended").read_text() == f"train rmipo: exit status {expected}\n"


def test_a_failed_command_ends_the_script_with_its_status(tmp_path: Path) -> None:
    run_script(LLAMA, environment(tmp_path, **own_inputs(tmp_path), FAILS="convert_hf_to_megatron"), expect=9)
    assert "convert" in calls(tmp_path)[-1]
    assert "convert the model: exit status 9" in (tmp_path / "work/.stages/ended").read_text()


def test_other_nodes_do_not_wait_for_a_first_node_that_failed(tmp_path: Path) -> None:
    inputs = own_inputs(tmp_path)
    first, second = (environment(tmp_path, **inputs, **TWO_NODES, NODE_RANK=rank) for rank in ("0", "1"))
    run_script(LLAMA, first | {"FAILS": "preprocess"}, expect=9)
    message = run_script(LLAMA, second | {"FAILURE_GRACE_SECONDS": "1"}, expect=1)
    assert "the first node has failed (preprocess train: exit status 9)" in message
    (tmp_path / "work/.stages/ended").write_text("convert the model: exit status 75")
    message = run_script(LLAMA, second | {"FAILURE_GRACE_SECONDS": "1"}, expect=75)
    assert "the first node has stopped; start this script again" in message
    # The note of an earlier start goes when the first node starts again.
    waiting = start_script(second | {"FAILURE_GRACE_SECONDS": "20"})
    time.sleep(1)
    run_script(LLAMA, first)
    output, _ = waiting.communicate(timeout=30)
    assert waiting.returncode == 0, output
    assert not (tmp_path / "work/.stages/ended").exists()


def test_other_nodes_wait_only_so_long(tmp_path: Path) -> None:
    variables = environment(tmp_path, **own_inputs(tmp_path), **TWO_NODES, NODE_RANK="1", STAGE_TIMEOUT_MINUTES="0")
    message = run_script(LLAMA, variables, expect=1)
    assert "within 0 minutes" in message
    assert "STAGE_TIMEOUT_MINUTES" in message
    assert calls(tmp_path) == []


def test_the_base_setting_starts_from_its_own_fine_tuning(tmp_path: Path) -> None:
    variables = environment(
        tmp_path, DRY_RUN="1", HF_MODEL="m", DATA="d", SFT_DATA="s", CHAT_TEMPLATE="llama3", DATA_SPLIT="train_prefs"
    )
    output = run_script(LLAMA, variables)
    sft, rmipo = trainings(output)
    assert (sft.objective.objective, sft.optimizer.lr) == ("sft", 2e-5)
    assert rmipo.checkpoint.load == sft.checkpoint.save
    prepared = [" ".join(command) for command in commands(output) if "preprocess" in command[1]]
    assert all("--chat-template llama3" in command for command in prepared)
    assert ["--split train_prefs" in command for command in prepared] == [True, False]


def test_slurm_gives_every_node_its_rank(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    variables = environment(tmp_path, DRY_RUN="1", HF_MODEL="m", DATA="d")
    (tools / "scontrol").write_text("#!/bin/sh\nprintf 'node7\\nnode8\\n'\n")
    (tools / "srun").write_text('#!/bin/sh\nSLURM_NODEID=1 exec "$@"\n')
    for name in ("scontrol", "srun"):
        (tools / name).chmod(stat.S_IRWXU)
    variables |= {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "12345", "SLURM_GPUS_ON_NODE": "8"}
    result = subprocess.run(
        ["bash", "examples/launchers/slurm.sbatch", "--epochs", "2"],
        env=variables, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "--nproc-per-node 8 --nnodes 2 --node-rank 1 --master-addr node7 --master-port 32345" in result.stdout
    assert trainings(result.stdout)[0].training.epochs == 2.0


def test_the_kubernetes_job_starts_a_script_with_variables_it_reads() -> None:
    documents = list(yaml.safe_load_all((ROOT / "examples/launchers/kubernetes.yaml").read_text()))
    service, job = documents
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    pod = job["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert (ROOT / container["command"][-1].split()[-1]).is_file()
    known = "".join((ROOT / "examples" / name).read_text() for name in ("stages.sh", "running.sh", "settings.sh", LLAMA))
    values = {entry["name"]: entry["value"] for entry in container["env"]}
    assert all(f"{name}" in known for name in values)
    assert values["NUM_NODES"] == str(job["spec"]["completions"]) == str(job["spec"]["parallelism"])
    assert values["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
