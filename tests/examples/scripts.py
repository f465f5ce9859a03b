"""Run the scripts people run, with stand-ins for python and torchrun, and read the commands they print."""

import os
import shlex
import stat
import subprocess
import sys
import time
from pathlib import Path

from megatron_rmipo.config.schema import Config
from megatron_rmipo.objectives.arguments import parse_arguments

ROOT = Path(__file__).parent.parent.parent
LAPTOP = "run_rmipo_smollm2.sh"
LLAMA = "run_rmipo_llama3_8b.sh"
LORA = "run_rmipo_llama3_8b_lora.sh"
TWO_NODES = {"NUM_NODES": "2", "MASTER_ADDR": "first"}
# A stand-in notes how it was called and writes what the real command writes last.
STAND_IN = """#!/usr/bin/env bash
if [[ "$*" == "-m megatron_rmipo.stage_record "* || "$*" == "-m megatron_rmipo.entry "* ]]; then exec "$REAL_PYTHON" "$@"; fi
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
        --save-hf | --save-adapter)
            if [[ -n "${INTERRUPTED:-}" ]]; then exit 75; fi
            mkdir -p "$2" && echo "{}" >"$2/$([[ "$1" == *adapter ]] && echo adapter_)config.json"
            ;;
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
