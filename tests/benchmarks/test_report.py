"""The frame that all benchmarks share: percentiles, goals, lines of CSV and JSON, the exit code."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks import report as module
from benchmarks.measure import Cost, Spread, measure
from benchmarks.report import Goal, add_report_options, append_rows, read_rows, report

REACHED = Goal("speed", 2.0, 2.5, at_least=True)
MISSED = Goal("memory", 1.5, 1.6)


def options_of(path: Path, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_report_options(parser, path)
    return parser.parse_args(arguments)


def test_percentiles_by_hand() -> None:
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == Spread(2.0, 3.5, 5.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_calls_are_timed_in_turns() -> None:
    order: list[str] = []
    costs = measure({name: lambda name=name: order.append(name) for name in ("a", "b")}, repeats=2)  # type: ignore[misc]
    assert order[:4] == ["a", "b", "a", "b"]
    assert list(costs) == ["a", "b"]
    assert list(costs["a"].figures()) == [
        *(f"{name}_{part}" for name in ("seconds", "cpu_seconds") for part in ("p20", "p50", "p80")),
        "flops",
        "peak_bytes",
    ]
    assert Cost(Spread(1, 2, 3), Spread(4, 5, 6), 7.0, 8).figures()["cpu_seconds_p80"] == 6


def test_goals_have_a_direction_and_nan_reaches_none() -> None:
    assert Goal("", 2.0, 2.0).reached
    assert Goal("", 2.0, 2.0, at_least=True).reached
    assert not Goal("", 2.0, 2.1).reached
    assert not Goal("", 2.0, 1.9, at_least=True).reached
    assert not Goal("", 2.0, math.nan).reached
    assert not Goal("", 2.0, math.nan, at_least=True).reached
    assert str(MISSED).split() == ["memory", "goal", "<=", "1.5", "measured", "1.6", "MISSED"]


def test_lines_of_other_columns_stand_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.csv"
    append_rows(path, [{"a": 1, "b": 0.123456789}])
    append_rows(path, [{"a": 2, "c": "x, y"}, {"a": 3, "c": "z"}])
    assert read_rows(path) == [
        {"a": "1", "b": "0.123457", "c": ""},
        {"a": "2", "b": "", "c": "x, y"},
        {"a": "3", "b": "", "c": "z"},
    ]
    assert [entry.name for entry in path.parent.iterdir()] == ["results.csv"]


@pytest.mark.parametrize(("flags", "goals", "code"), [((), [MISSED], 0), (("--check",), [REACHED], 0), (("--check",), [], 1)])
def test_exit_code(tmp_path: Path, flags: tuple[str, ...], goals: list[Goal], code: int) -> None:
    assert report(options_of(tmp_path / "a.csv", *flags), "speed", "a table", [{"x": 1}], goals) == code


def test_a_missed_goal_is_named_with_goal_and_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.csv"
    assert report(options_of(path, "--check"), "speed", "a table", [{"x": 1}], [REACHED, MISSED]) == 1
    output, errors = capsys.readouterr()
    assert output.splitlines()[0] == "a table"
    assert "speed" not in errors
    assert errors.split() == ["goal", "missed:", "memory", "goal", "<=", "1.5", "measured", "1.6", "MISSED"]
    (row,) = read_rows(path)
    assert row["x"] == "1"
    assert all(row[name] for name in ("date", "device", "torch", "megatron_core", "transformers"))
    goals = read_rows(tmp_path / "goals.csv")
    assert [(goal["benchmark"], goal["name"], goal["limit"], goal["measured"], goal["reached"]) for goal in goals] == [
        ("speed", "speed", "2", "2.5", "True"),
        ("speed", "memory", "1.5", "1.6", "False"),
    ]
    assert [goal["at_least"] for goal in goals] == ["True", "False"]
    assert goals[0]["date"] == row["date"]


def test_without_goals_none_are_written(tmp_path: Path) -> None:
    report(options_of(tmp_path / "a.csv"), "speed", "a table", [{"x": 1}], [])
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.csv"]


def test_json_is_one_line_with_all_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(options_of(tmp_path / "a.csv", "--json"), "speed", "a table", [{"x": 1.25}], [MISSED])
    (line,) = capsys.readouterr().out.splitlines()
    figures = json.loads(line)
    assert (figures["benchmark"], figures["rows"]) == ("speed", [{"x": 1.25}])
    assert figures["goals"] == [{"name": "memory", "limit": 1.5, "measured": 1.6, "at_least": False, "reached": False}]


def test_what_was_measured_is_shown_where_it_cannot_be_appended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert report(options_of(tmp_path / "file" / "a.csv"), "speed", "a table", [{"x": 1}], [REACHED]) == 1
    output, errors = capsys.readouterr()
    assert output.splitlines() == ["a table", str(REACHED)]
    assert errors.startswith(f"error: --csv {tmp_path / 'file' / 'a.csv'}: not appended: ")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One commit of a program and of benchmarks with entries and lengths."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    for name in ("a.py", "benchmarks/results.csv", "benchmarks/lengths/hh.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "--quiet"], ["add", "."], [*author, "commit", "--quiet", "--message", "a"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    monkeypatch.setattr(module, "FOLDER", tmp_path / "benchmarks")
    return tmp_path


def test_entries_do_not_make_a_commit_dirty(repository: Path) -> None:
    name = module.commit()
    assert len(name) >= 7
    assert "dirty" not in name
    (repository / "benchmarks" / "results.csv").write_text("1\n2\n")
    (repository / "new.py").write_text("")
    assert module.commit() == name
    for changed in ("a.py", "benchmarks/lengths/hh.csv"):
        (repository / changed).write_text("2\n")
        assert module.commit() == f"{name}-dirty"
        (repository / changed).write_text("1\n")


def test_without_git_or_a_repository_the_commit_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert module.commit() == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module.environment()["commit"] == ""
