"""Subcommands and their completion, as a shell runs it."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rmipo import completion, entry

ROOT = Path(__file__).parent.parent
# Of the examples and the demo, for nobody to type.
INTERNAL = {"make_inputs", "stage_record"}


@pytest.fixture(scope="module")
def flags() -> dict[str, completion.Flags]:
    return {name: completion.flags_of(name) for name in entry.SUBCOMMANDS}


def run_bash(script: str, *words: str) -> list[str]:
    """What bash offers behind these words."""
    line = " ".join(f"'{word}'" for word in words)
    ask = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _megatron_rmipo; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.split()


def test_bash_completes_commands_flags_and_values(flags: dict[str, completion.Flags]) -> None:
    script = completion.script("bash", flags)
    offer = functools.partial(run_bash, script, "megatron-rmipo")
    assert offer("verify-") == ["verify-conversion", "verify-checkpoint"]
    assert offer("train", "--tensor-model-p") == ["--tensor-model-parallel-size"]
    assert offer("train", "--lr", "1", "--attention-backend", "s") == ["sdpa"]
    assert offer("preprocess", "--overlong", "left") == ["left-truncate-prompt"]
    assert offer("train", "--load-hf", "/mod") == []  # files, by readline's default
    assert "--nproc-per-node" in offer("launch", "--nproc")


def test_every_command_has_flags_and_every_shell_a_script(flags: dict[str, completion.Flags]) -> None:
    assert [name for name, its in flags.items() if "--help" not in its] == []
    for shell, program in (("bash", "bash"), ("zsh", "zsh"), ("fish", "fish")):
        script = completion.script(shell, flags)
        assert "tensor-model-parallel-size" in script
        if shutil.which(program):
            subprocess.run([program, "-n"], input=script, text=True, timeout=30, check=True)


def test_each_command_is_a_subcommand_with_a_line_and_installed() -> None:
    commands = {name: value for name, value in vars(entry).items() if isinstance(value, functools.partial)}
    listed = {id(command) for command, _ in entry.SUBCOMMANDS.values()}
    assert {name for name, command in commands.items() if id(command) not in listed} == INTERNAL
    assert all(0 < len(text) < 100 for _, text in entry.SUBCOMMANDS.values())
    installed = set(re.findall(r'"megatron_rmipo\.entry:(\w+)"', (ROOT / "setup.py").read_text()))
    assert set(commands) - INTERNAL - installed == {"completion"}


def test_megatron_rmipo_starts_what_it_is_told_to(tmp_path: Path) -> None:
    def run(*argv: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "megatron_rmipo", *argv]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
        return done.returncode, done.stdout, done.stderr

    code, shown, _ = run("--help")
    assert code == 0
    assert [name for name in entry.SUBCOMMANDS if f"\n  {name} " not in shown] == []
    assert run("compare-run")[::2] == (1, "error: megatron-rmipo compare-run: no such command; did you mean compare-runs?\n")
    code, _, error = run("inspect-pairs", str(tmp_path / "none"))
    assert (code, error.startswith(f"error: {tmp_path / 'none'}.json: not found")) == (1, True), error
