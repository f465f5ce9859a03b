"""The scripts people run: their commands are printed, parsed and, with stand-ins for python and torchrun, run through."""

import os
import shlex
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from megatron_rmipo.config.schema import Config
from megatron_rmipo.objectives.arguments import parse_arguments
from megatron_rmipo.training.validation import problems_without_model

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = sorted(path.name for path in (ROOT / "examples").glob("run_*.sh"))
LLAMA = "run_rmipo_llama3_8b.sh"
# A stand-in notes how it was called and writes what the real command writes last.
STAND_IN = """#!/usr/bin/env bash
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
        --save-hf) if [[ -z "${INTERRUPTED:-}" ]]; then mkdir -p "$2" && echo "{}" >"$2/config.json"; fi ;;
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
    return {**base, "WORK_DIR": str(tmp_path / "work"), **variables}


def run_script(name: str, variables: dict[str, str], *flags: str, expect: int = 0) -> str:
    result = subprocess.run(
        ["bash", str(ROOT / "examples" / name), *flags], env=variables, capture_output=True, text=True, timeout=60, check=False
    )
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


def commands(output: str) -> list[list[str]]:
    return [shlex.split(line) for line in output.splitlines() if line.startswith(("python ", "torchrun "))]


def trainings(output: str) -> list[Config]:
    """The configurations of the trainer's commands, as the trainer itself reads them."""
    lines = [command for command in commands(output) if command[0] == "torchrun"]
    return [parse_arguments(line[line.index("megatron_rmipo.train") + 1 :]) for line in lines]


def own_inputs(tmp_path: Path) -> dict[str, str]:
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    return {"HF_MODEL": str(model), "DATA": "pairs.jsonl"}


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
        assert config.parallel.tensor_model_parallel_size == 2
    for command in commands(output):
        if command[0] == "python":
            assert (ROOT / command[1]).is_file(), command[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_own_inputs_train_with_the_papers_settings(script: str, tmp_path: Path) -> None:
    variables = environment(tmp_path, DRY_RUN="1", HF_MODEL="/models/m", DATA="pairs.jsonl", GPUS_PER_NODE="8")
    (config,) = trainings(run_script(script, variables))
    assert problems_without_model(config) == []
    assert config.objective.options["beta"] == 2.0
    assert (config.objective.options["gamma_min"], config.objective.options["gamma_max"]) == (0.3, 1.6)
    assert config.objective.options["preset"] == "paper"
    assert (config.training.global_batch_size, config.data.seq_length, config.training.epochs) == (128, 2048, 1.0)
    assert (config.optimizer.optimizer, config.optimizer.lr_decay_style, config.optimizer.lr_warmup_fraction) == (
        "adam",
        "cosine",
        0.1,
    )
    assert 3e-7 <= config.optimizer.lr <= 1e-6
    assert config.model.bf16
    assert config.parallel.use_distributed_optimizer
    assert config.parallel.tensor_model_parallel_size == 4


def test_the_layout_follows_the_variables(tmp_path: Path) -> None:
    layout = {"GPUS_PER_NODE": "2", "NUM_NODES": "3", "NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "6001", "PP": "2"}
    output = run_script(LLAMA, environment(tmp_path, DRY_RUN="1", HF_MODEL="m", DATA="d", **layout), "--epochs", "2")
    (line,) = [command for command in commands(output) if command[0] == "torchrun"]
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


def test_stages_run_in_order_and_are_skipped_when_complete(tmp_path: Path) -> None:
    variables = environment(tmp_path)
    run_script(LLAMA, variables)
    programs = [call.split()[1] for call in calls(tmp_path) if call.startswith("python")]
    assert programs == [
        "examples/embedded/make_inputs.py",
        "tools/preprocess_preferences.py",
        "tools/preprocess_preferences.py",
        "tools/convert_hf_to_megatron.py",
        "tools/preprocess_preferences.py",
        "tools/summarize_run.py",
    ]
    output = run_script(LLAMA, variables)
    assert [call.split()[1] for call in calls(tmp_path)] == ["tools/summarize_run.py"]
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
    assert "pairs.jsonl" in message
    assert "others.jsonl" in message
    assert "WORK_DIR" in message
    message = run_script(LLAMA, environment(tmp_path, **inputs), "--epochs", "3", expect=1)
    assert "other settings" in message
    # Another layout trains the same model.
    run_script(LLAMA, environment(tmp_path, **inputs, GPUS_PER_NODE="4"))


def test_an_interrupted_training_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    inputs = own_inputs(tmp_path)
    output = run_script(LLAMA, environment(tmp_path, **inputs, INTERRUPTED="1", STEP="40"), "--exit-interval", "40", expect=75)
    assert "stopped before its end" in output
    first = calls(tmp_path)
    assert first[-1].startswith("torchrun")
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
    variables = environment(tmp_path, **inputs, SFT_DATA="sft.jsonl")
    run_script(LLAMA, variables)
    work = tmp_path / "work"
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "model", other)
    changed = variables | {"HF_MODEL": str(other)}
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
        assert "made with other settings" in message
        for path in remedy:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    run_script(LLAMA, changed)
    # Without the fine-tuning the preference training starts elsewhere.
    assert "train rmipo: " in run_script(LLAMA, changed | {"SFT_DATA": ""}, expect=1)


def test_the_number_of_workers_changes_no_data(tmp_path: Path) -> None:
    inputs = own_inputs(tmp_path)
    run_script(LLAMA, environment(tmp_path, **inputs, WORKERS="3"))
    assert "--workers 3" in calls(tmp_path)[0]
    assert "preprocess train: already there" in run_script(LLAMA, environment(tmp_path, **inputs, WORKERS="5"))


@pytest.mark.parametrize(("status", "expected"), [("0", 75), ("3", 3)])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_torchrun_and_its_status_comes_back(
    tmp_path: Path, sent: signal.Signals, status: str, expected: int
) -> None:
    script = start_script(environment(tmp_path, **own_inputs(tmp_path), HANGS="megatron_rmipo.train", STATUS=status))
    wait_until_called(tmp_path, "hanging")
    script.send_signal(sent)
    output, _ = script.communicate(timeout=30)
    assert script.returncode == expected, output
    assert calls(tmp_path)[-2:] == [f"heard {sent.name.removeprefix('SIG')}", "saved"]
    assert "stopped by a signal" in output


def test_a_launcher_that_signals_everything_is_not_doubled(tmp_path: Path) -> None:
    variables = environment(tmp_path, **own_inputs(tmp_path), HANGS="megatron_rmipo.train", STATUS="4", SIGNALS_REACH_ALL="1")
    script = start_script(variables)
    wait_until_called(tmp_path, "hanging")
    script.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert script.poll() is None
    children = Path(f"/proc/{script.pid}/task/{script.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGTERM)
    output, _ = script.communicate(timeout=30)
    assert script.returncode == 4, output
    assert calls(tmp_path).count("heard TERM") == 1


def test_a_failed_command_ends_the_script_with_its_status(tmp_path: Path) -> None:
    run_script(LLAMA, environment(tmp_path, **own_inputs(tmp_path), FAILS="convert_hf_to_megatron"), expect=9)
    assert "convert" in calls(tmp_path)[-1]
    assert "convert the model: exit status 9" in (tmp_path / "work/.stages/failed").read_text()


def test_other_nodes_do_not_wait_for_a_first_node_that_failed(tmp_path: Path) -> None:
    inputs = own_inputs(tmp_path)
    first, second = (environment(tmp_path, **inputs, NUM_NODES="2", NODE_RANK=rank) for rank in ("0", "1"))
    run_script(LLAMA, first | {"FAILS": "preprocess"}, expect=9)
    message = run_script(LLAMA, second | {"FAILURE_GRACE_SECONDS": "1"}, expect=1)
    assert "the first node has failed (preprocess train: exit status 9)" in message
    # The note of an earlier start goes when the first node starts again.
    waiting = start_script(second | {"FAILURE_GRACE_SECONDS": "20"})
    time.sleep(1)
    run_script(LLAMA, first)
    output, _ = waiting.communicate(timeout=30)
    assert waiting.returncode == 0, output
    assert not (tmp_path / "work/.stages/failed").exists()


def test_other_nodes_wait_only_so_long(tmp_path: Path) -> None:
    variables = environment(tmp_path, **own_inputs(tmp_path), NUM_NODES="2", NODE_RANK="1", STAGE_TIMEOUT_MINUTES="0")
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
