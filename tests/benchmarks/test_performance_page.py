"""docs/performance.md says what the entries say, of each setting the newest."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import pytest

from benchmarks import performance_page
from benchmarks.performance_page import Environments, main, newest, render, show_goals, show_table
from benchmarks.performance_tables import TABLES, Figure, Table
from benchmarks.report import Goal, read_rows, report

PLACE = {"date": "2026-01-02", "commit": "abc", "device": "a|b", "torch": "1", "megatron_core": "2", "transformers": "3"}
LATER = PLACE | {"date": "2026-02-03"}
TABLE = Table(
    "results_x.csv",
    {"size": "{a} x {b}"},
    (Figure("MB", "bytes", scale=1e-6, form=".1f"), Figure("ratio", "theirs", "ours")),
    needs="ours",
    only={"kind": "p"},
)


def row(**values: str) -> dict[str, str]:
    return {"kind": "p", "a": "1", "b": "2", "bytes": "2500000", "theirs": "3", "ours": "1.5", **PLACE, **values}


def test_the_page_is_what_the_entries_say() -> None:
    assert main(["--check"]) == 0, "run: make performance"


def test_figures_by_hand() -> None:
    assert [figure.text(row()) for figure in TABLE.figures] == ["2.5", "2.00"]
    assert [figure.text(row(bytes="", ours="")) for figure in TABLE.figures] == ["", ""]
    assert Figure("", "share", form=".1%").text({"share": "0.4567"}) == "45.7%"


def test_the_newest_of_each_setting_with_its_place() -> None:
    environments = Environments()
    rows = [row(), row(a="7"), row(ours="3", **LATER), row(kind="q"), row(ours="")]
    assert show_table(TABLE, rows, environments).splitlines() == [
        "| size | MB | ratio | where |",
        "| --- | --- | --- | --- |",
        "| 1 x 2 | 2.5 | 1.00 | 1 |",
        "| 7 x 2 | 2.5 | 2.00 | 2 |",
    ]
    assert environments.table().splitlines()[2:] == [
        "| 1 | 2026-02-03 | abc | a\\|b | 1 | 2 | 3 |",
        "| 2 | 2026-01-02 | abc | a\\|b | 1 | 2 | 3 |",
    ]
    assert show_table(TABLE, [row(kind="q")], environments) == "Not measured yet."
    assert newest([{"a": "1", "b": "x"}, {"a": "2", "b": "y"}, {"a": "1", "b": "z"}], ("a",)) == [
        {"a": "1", "b": "z"},
        {"a": "2", "b": "y"},
    ]


def test_goals_missed_ones_too(tmp_path: Path) -> None:
    def goal(benchmark: str, name: str, limit: str, measured: str, at_least: str, reached: str) -> dict[str, str]:
        own = {"benchmark": benchmark, "name": name, "limit": limit, "measured": measured}
        return PLACE | own | {"at_least": at_least, "reached": reached}

    rows = [
        goal("step", "speed", "2.4", "3", "True", "True"),
        goal("data", "speed", "2", "1", "True", "False"),
        goal("step", "speed", "2.4", "2.34567", "True", "False"),
        goal("step", "memory", "1.01", "1", "False", "True"),
    ]
    assert show_goals(rows, Environments()).splitlines()[2:] == [
        "| speed | at least 2.4 | 2.346 | **no** | 1 |",
        "| speed | at least 2 | 1 | **no** | 1 |",
        "| memory | at most 1.01 | 1 | yes | 1 |",
    ]


def test_goals_are_read_as_reports_write_them(tmp_path: Path) -> None:
    goals = [Goal("a", 2.0, 2.5, at_least=True), Goal("b", 1.0, 1.5)]
    report(argparse.Namespace(csv=tmp_path / "x.csv", json=False, check=False), "x", "", [{"y": 1}], goals)
    text = render(tmp_path)
    assert "| a | at least 2 | 2.5 | yes | 1 |\n| b | at most 1 | 1.5 | **no** | 1 |" in text
    # Nothing else was measured there.
    assert text.count("Not measured yet.") == len(TABLES)


def test_a_stale_page_is_noticed_and_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "performance.md"
    monkeypatch.setattr(performance_page, "PAGE", page)
    assert main(["--check"]) == 1
    assert not page.exists()
    assert main([]) == 0
    assert main(["--check"]) == 0
    page.write_text(page.read_text() + "\n")
    assert main(["--check"]) == 1
    assert capsys.readouterr().err.count("Run: make performance") == 2


def test_entries_are_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    assert read_rows(path) == []
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["x"], ["2"], ["1"]])
    assert read_rows(path) == [{"x": "2"}, {"x": "1"}]
