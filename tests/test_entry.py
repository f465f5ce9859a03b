"""How commands start and end, shown by a module that does nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rmipo.torchrun import ENDS_VARIABLE

ROOT = Path(__file__).parent.parent
SIGNALLED = "import os, signal\nos.kill(os.getpid(), signal.{})"


def start(tmp_path: Path, source: str, *flags: str, on_ranks: bool = False, **variables: str) -> tuple[int, str]:
    """Exit code and standard error of a command of this source."""
    (tmp_path / "pretended.py").write_text(source)
    program = f"import sys; from megatron_rmipo.entry import start; sys.exit(start('pretended', on_ranks={on_ranks}))"
    paths = f"{ROOT}:{tmp_path}"
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONWARNINGS", "RANK")}
    # A process in the background may have been started to ignore SIGINT.
    command = ["env", "--default-signal=INT", sys.executable, "-c", program, *flags]
    done = subprocess.run(
        command, env={**clean, "PYTHONPATH": paths, **variables}, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("def main(): return 0", 0, ""),
        ("import argparse\ndef main(): argparse.ArgumentParser().parse_args(['--colour'])", 1, "unrecognized arguments"),
        ("from megatron_rmipo.errors import ConfigError\nraise ConfigError('--lr: no')", 1, "error: --lr: no\n"),
        ("{}['key']", 70, "Traceback"),
        (SIGNALLED.format("SIGINT"), 130, "interrupted\n"),
        (SIGNALLED.format("SIGTERM"), 130, "interrupted\n"),
    ],
)
def test_every_kind_of_end_has_its_code(tmp_path: Path, source: str, code: int, said: str) -> None:
    found, error = start(tmp_path, source)
    assert (found, said in error, "Traceback" in error) == (code, True, code == 70), error


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_rank_that_listens_for_no_signal_yet_ends_at_once_and_says_nothing(tmp_path: Path, name: str) -> None:
    code, error = start(tmp_path, SIGNALLED.format(name), on_ranks=True)
    assert (-code, error) == ({"SIGINT": 2, "SIGTERM": 15}[name], "")


def test_a_rank_that_stopped_tells_the_launcher_and_else_its_exit_code_does(tmp_path: Path) -> None:
    stopped = "def main(): return 75"
    assert start(tmp_path, stopped, on_ranks=True) == (75, "")
    ends = tmp_path / "ends"
    ends.mkdir()
    place = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    variables = {ENDS_VARIABLE: str(ends), **place}
    assert start(tmp_path, stopped, on_ranks=True, **variables) == (0, "")
    assert (ends / "3").read_text().split()[1] == "75"
    assert start(tmp_path, "def main(): return 1", on_ranks=True, **variables) == (1, "")
    assert (ends / "3").read_text().split()[1] == "1"
    # One that torchrun starts anew, and that is killed, has not ended as before.
    killed = "import os\ndef main(): os.kill(os.getpid(), 9)"
    assert start(tmp_path, killed, on_ranks=True, **variables)[0] == -9
    assert not (ends / "3").exists()


def test_warnings_of_other_packages_are_shown_with_debug_alone(tmp_path: Path) -> None:
    # In a process that it starts, too.
    source = (
        "import subprocess, sys, warnings\nwarnings.warn('falling back')\n"
        "def main(): return subprocess.call([sys.executable, '-c', 'import warnings; warnings.warn(\"falling back\")'])"
    )
    assert start(tmp_path, source) == (0, "")
    assert start(tmp_path, source, "--debug")[1].count("UserWarning: falling back") == 2


def test_what_other_packages_log_at_import_is_shown_with_debug_alone(tmp_path: Path) -> None:
    source = (
        "import logging, os, torch, torch.utils.cpp_extension as extension\nextension.logger.warning('no CUDA runtime')\n"
        "print('transformers say', os.environ.get('TRANSFORMERS_VERBOSITY'), file=__import__('sys').stderr)\n"
        "def main(): return 0"
    )
    assert start(tmp_path, source) == (0, "transformers say error\n")
    assert start(tmp_path, source, TRANSFORMERS_VERBOSITY="info")[1] == "transformers say info\n"
    assert "no CUDA runtime" in start(tmp_path, source, "--debug")[1]
