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
    assert '-m "not slow and not dist"' in dry_make("test-fast")


def test_clean_leaves_results_alone(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept = [tmp_path / name for name in ("work/a/__pycache__/model", "runs/b/metrics.jsonl", "benchmarks/results.csv")]
    removed = [tmp_path / name for name in (".venv/bin/x", "build/x", "a.egg-info/x", ".mypy_cache/x", "tests/a/__pycache__/x")]
    for path in (*kept, *removed):
        path.parent.mkdir(parents=True)
        path.write_text("")
    subprocess.run(["make", "clean"], cwd=tmp_path, capture_output=True, timeout=60, check=True)
    assert all(path.exists() for path in kept)
    assert not any(path.parent.exists() for path in removed)


def test_bench_appends_to_a_file_that_git_ignores() -> None:
    assert '--csv "runs/benchmarks.csv"' in dry_make("bench")
    ignored = subprocess.run(["git", "check-ignore", "-q", "runs/benchmarks.csv"], cwd=ROOT, timeout=60, check=False)
    assert ignored.returncode in (0, 128)  # 128: not a git checkout
