"""Directories that appear whole: whatever the name that a user gives them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rmipo.checkpoint.whole_directories import REMOVED_SUFFIX, check_output_directory, discard, new_directory
from megatron_rmipo.errors import ConversionError


def fill(given: str) -> None:
    check_output_directory(Path(given), "--save-hf")
    with new_directory(Path(given)) as partial:
        (partial / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("given", "final"), [(".", "here"), ("sub/..", "here"), ("sub/../new", "here/new"), ("../other/", "other")]
)
def test_names_that_only_the_path_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, final: str) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    fill(given)
    monkeypatch.chdir(tmp_path)
    assert (tmp_path / final / "config.json").read_text() == "{}"
    assert not list(tmp_path.rglob("*.incomplete"))


@pytest.mark.parametrize("given", [".", "sub/.."])
def test_a_directory_that_holds_something_is_refused_as_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConversionError, match=f"--save-hf {given} exists and holds sub"):
        check_output_directory(Path(given), "--save-hf")


def test_a_links_target_is_filled(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    fill(str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target/config.json").exists()


DISCARD = """
import shutil, sys, time
from pathlib import Path
from megatron_rmipo.checkpoint.whole_directories import discard
remove = shutil.rmtree
shutil.rmtree = lambda path: (time.sleep(0.5), remove(path))
discard(Path(sys.argv[1]))
"""


def test_a_process_that_ends_waits_for_what_it_removes(tmp_path: Path) -> None:
    directory = tmp_path / "old"
    (directory / "hf").mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", DISCARD, str(directory)], check=True, env=environment)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_not_there_or_cannot_be_renamed_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    discard(tmp_path / "gone")
    assert capsys.readouterr().err == ""

    def refuse(*paths: Path) -> None:
        assert str(paths[1]).endswith(REMOVED_SUFFIX)
        raise PermissionError(13, "not yours")

    monkeypatch.setattr(os, "replace", refuse)
    (tmp_path / "kept").mkdir()
    discard(tmp_path / "kept")
    assert f"{tmp_path / 'kept'} could not be removed: [Errno 13] not yours. Remove it by hand." in capsys.readouterr().err
