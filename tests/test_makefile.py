"""The Makefile's choice of interpreter and environment, printed and not run."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def dry_make(*arguments: str) -> str:
    result = subprocess.run(
        ["make", "--always-make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    return result.stdout


def test_the_default_environment_is_dot_venv() -> None:
    output = dry_make("test")
    assert "-m venv .venv\n" in output
    assert output.index("torch") < output.index("--editable")
    assert ".venv/bin/python -m pytest" in output


def test_another_version_gets_an_environment_of_its_own() -> None:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    expected = ".venv" if version == "3.11" else f".venv-{version}"
    assert f"-m venv {expected}\n" in dry_make("venv", f"PYTHON={sys.executable}")


def test_torch_can_be_chosen() -> None:
    assert "install 'torch==2.12.1'" in dry_make("venv", "TORCH=torch==2.12.1")


def test_an_interpreter_that_does_not_run_is_named() -> None:
    result = subprocess.run(
        ["make", "--always-make", "venv", "PYTHON=python9.9"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode != 0
    assert "'python9.9' does not run" in result.stderr
    assert not list(ROOT.glob(".venv-9*"))
    assert not (ROOT / ".venv-").exists()


def test_fast_leaves_out_the_slow_ones() -> None:
    assert '-m "not slow"' in dry_make("test-fast")
