"""Two hosts that would not run the same: refused on both ranks, in the same words, before anything is trained."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_rmipo.checkpoint.megatron.record import read_record, write_record
from megatron_rmipo.command import STOPPED
from megatron_rmipo.errors import RmipoError
from megatron_rmipo.objectives.arguments import parse_arguments
from megatron_rmipo.runtime import first_failure
from megatron_rmipo.runtime.rendezvous import Rendezvous
from megatron_rmipo.scoring import score_cli
from megatron_rmipo.training import main as trainer
from tests.harness import free_port, run_distributed
from tests.integration.data import MODEL, write_pairs
from tests.integration.test_training import flags, losses, output_of

# What the first host has under these names, each relative to where its rank stands.
ARGUMENTS = flags(Path("pairs"), Path("run"), load_hf="model", load="run", split=None, train_iters=3)
SCORING = ["--load-hf", "model", "--pairs", "pairs", "--tokens-per-microbatch", "700"]


class OtherHost:
    """The files of the first host, of which one will be another, and what else is other there."""

    def __init__(self, folder: Path, first: Path) -> None:
        shutil.copytree(first, folder)
        self.folder = folder

    def show_no_newest_checkpoint(self) -> None:
        shutil.rmtree(self.folder / "run" / "iter_0000002")

    def show_no_checkpoint(self) -> None:
        shutil.rmtree(self.folder / "run")

    def change_progress(self) -> None:
        path = self.folder / "run" / "iter_0000002"
        record = read_record(path)
        assert record is not None
        record.train_state["skipped_steps"] = 1
        write_record(path, record, record.digests)

    def change_architecture(self) -> None:
        path = self.folder / "model" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": 12345.0}))

    def change_weights(self) -> None:
        path = self.folder / "model" / "model.safetensors"
        tensors = load_file(path)
        tensors["model.norm.weight"] += 1.0
        save_file(tensors, path, metadata={"format": "pt"})

    def change_lengths(self) -> None:
        write_pairs(self.folder / "pairs", swap_first=True)

    def change_a_token(self) -> None:
        path = self.folder / "pairs.bin"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def remove_data(self) -> None:
        (self.folder / "pairs.bin").unlink()


# Case -> (flags of the second rank alone, environment of it, change to its files), and what is said.
CASES: dict[str, tuple[list[str], dict[str, str], str, list[str]]] = {
    "seed": (["--seed", "7"], {}, "", ["--seed is 1234 on rank 0 (", "but 7 on rank 1 ("]),
    "learning rate": (["--lr", "2e-3"], {}, "", ["--lr is 0.001 on", "but 0.002 on"]),
    "option": (["--beta", "3.5"], {}, "", ["--beta is 2.0 on", "but 3.5 on"]),
    "objective": (["--objective", "simpo"], {}, "", ["--objective is rmipo on", "but simpo on", " more differ: "]),
    "layout": (["--tensor-model-parallel-size", "2"], {}, "", ["--tensor-model-parallel-size is 1 on", "but 2 on"]),
    "timeout": (["--distributed-timeout-minutes", "3"], {}, "", ["--distributed-timeout-minutes is 10.0 on", "but 3.0 on"]),
    "an extra flag": (["--overlap-grad-reduce"], {}, "", ["--overlap-grad-reduce is False on", "but True on"]),
    "a mistyped flag": (["--seeed", "7"], {}, "", ["rank 1 (", "cannot start, so no rank does: --seeed", "--seed?"]),
    "environment": (
        [],
        {"NVIDIA_TF32_OVERRIDE": "0"},
        "",
        ["environment variable NVIDIA_TF32_OVERRIDE is not set on", "but 0 on"],
    ),
    "version": ([], {}, "version", ["version of transformers is ", "but 0.0.1 on rank 1 ("]),
    "newest checkpoint": ([], {}, "show_no_newest_checkpoint", ["checkpoint found in run is iter_0000002 on", "iter_0000001 on"]),
    "no checkpoint": ([], {}, "show_no_checkpoint", ["the model to start from is run on rank 0", "but model on rank 1"]),
    "progress": ([], {}, "change_progress", ["content of run/iter_0000002/rmipo.json is ", "the run's skipped_steps."]),
    "architecture": ([], {}, "change_architecture", ["model's ropes is [{'base': 500000.0, ", "but [{'base': 12345.0, "]),
    "weights": ([], {}, "change_weights", ["content of model/model.safetensors is "]),
    "lengths": ([], {}, "change_lengths", ["lengths of pairs is ", "the run's data."]),
    "a token": ([], {}, "change_a_token", ["tokens of pairs is ", "1 more differ: the run's data."]),
    "missing data": ([], {}, "remove_data", ["DataError: rank 1 (", "pairs.bin", "missing"]),
}
# No run goes on in these: the Hugging Face model would not be looked at, and the rank with other data would refuse by itself.
FROM_HF = {"weights", "architecture", "lengths", "a token"}


def told(arguments: list[str]) -> str:
    """What ends a run on this rank."""
    try:
        with Rendezvous() as rendezvous:
            trainer.run_training(parse_arguments(arguments), rendezvous)
    except RmipoError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def told_of_all(folder: str) -> tuple[dict[str, str], tuple[int, str]]:
    """What each case ends with on this rank, and what a difference in scoring does; checkpoints are written first."""
    first, second = Path(folder) / "first", os.environ["RANK"] == "1"
    os.chdir(first)
    first_failure._SILENT_SECONDS = 0.0
    assert trainer.main([*ARGUMENTS[:-2], "--num-workers", "0", "--save-interval", "1", "--exit-interval", "2"]) == STOPPED
    real_version, texts = importlib.metadata.version, {}
    for name, (extra, environment, change, _) in CASES.items():
        arguments = [argument for argument in ARGUMENTS if name not in FROM_HF or argument not in ("--load", "--save", "run")]
        if second:
            host = OtherHost(Path(folder) / name, first)
            if change == "version":
                importlib.metadata.version = lambda wanted: "0.0.1" if wanted == "transformers" else real_version(wanted)
            elif change:
                getattr(host, change)()
            os.chdir(host.folder)
            os.environ.update(environment)
            arguments += extra
        texts[name] = told(arguments)
        importlib.metadata.version = real_version
        for variable in environment:
            os.environ.pop(variable, None)
    os.chdir(first)
    return texts, output_of(score_cli.main, [*SCORING, *(["--bf16"] if second else [])])


@pytest.mark.dist
@pytest.mark.slow
def test_the_table_of_disagreements(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    shutil.copytree(MODEL, tmp_path / "first" / "model")
    for path in (tmp_path / "first" / "model", *(tmp_path / "first" / "model").iterdir()):
        path.chmod(0o755)
    write_pairs(tmp_path / "first" / "pairs")
    (texts, scored), (other_texts, other_scored) = run_distributed(told_of_all, 2, str(tmp_path))
    assert texts == other_texts, "one error, the same on every rank"
    unsaid = {name: (word, texts[name]) for name, (*_, words) in CASES.items() for word in words if word not in texts[name]}
    assert not unsaid
    assert {len(text.splitlines()) for text in texts.values()} == {1}
    assert (scored[0], other_scored) == (1, (1, "")), "told once for both"
    assert "--bf16 is False on rank 0 (" in scored[1]
    assert max(losses(tmp_path / "first" / "run")) == 2, "nothing was trained"


@pytest.mark.dist
@pytest.mark.slow
def test_under_torchrun_a_difference_is_told_once_and_nothing_is_written(tmp_path: Path) -> None:
    program = (
        "import os, sys\nfrom megatron_rmipo.train import main\nsys.argv += ['--seed', os.environ['RANK']]\nsys.exit(main())\n"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    arguments = flags(write_pairs(tmp_path / "pairs"), tmp_path / "run")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended: Any = subprocess.run([*command, str(script), *arguments], capture_output=True, text=True, env=environment, timeout=200)
    assert ended.returncode != 0
    assert len(re.findall("the ranks would not run the same", ended.stderr)) == 1, ended.stderr
    assert re.search(r"\[rank 0\] ConfigError: .*--seed is 0 on rank 0 \(\S+\), but 1 on rank 1 \(\S+\)\.", ended.stderr)
    assert not (tmp_path / "run").exists()
