"""Records in metrics.jsonl, held-out pairs and answers beside it; new and resumed runs."""

from __future__ import annotations

import json
import math
import tracemalloc
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.reports.reporter import Reporter, evaluation_kind, pairs_file


def reporter(log_dir: Path, **options: Any) -> Reporter:
    return Reporter(log_dir, total_steps=20, stream=StringIO(), **options)


def lines(log_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in (log_dir / name).read_text().splitlines()]


def log_steps(log_dir: Path, first: int, last: int, **options: Any) -> None:
    with reporter(log_dir, **options) as report:
        for step in range(first, last + 1):
            report.log("train", {"step": step, "loss": 1.0 / step})


def test_records_are_there_before_the_run_ends(tmp_path: Path) -> None:
    report = reporter(tmp_path / "logs")
    report.log("train", {"step": 1, "loss": 0.5, "grad_norm": math.inf})
    report.log("eval", {"step": 1, "loss": math.nan})
    train, evaluation = lines(tmp_path / "logs")
    assert {name: train[name] for name in ("kind", "step", "loss", "grad_norm")} == {
        "kind": "train",
        "step": 1,
        "loss": 0.5,
        "grad_norm": None,
    }
    assert train["time"] > 1.7e9
    assert (evaluation["kind"], evaluation["loss"]) == ("eval", None)
    report.close()
    report.close()


def test_a_resumed_run_drops_what_lies_beyond_its_step_and_a_torn_line(tmp_path: Path) -> None:
    log_steps(tmp_path, 1, 4)
    # Killed before the end of the line was written.
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip())
    log_steps(tmp_path, 5, 7, resumed_step=4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    log_steps(tmp_path, 5, 6, resumed_step=4)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert not list(tmp_path.glob("*.new"))


def test_a_new_run_puts_the_earlier_file_aside(tmp_path: Path) -> None:
    for last in (3, 2, 1):
        log_steps(tmp_path, 1, last)
    assert len(lines(tmp_path)) == 1
    assert len(lines(tmp_path, "metrics.1.jsonl")) == 3
    assert len(lines(tmp_path, "metrics.2.jsonl")) == 2


def test_the_pairs_of_the_first_and_of_the_last_evaluation_are_kept(tmp_path: Path) -> None:
    def evaluate(report: Reporter, step: int, margin: float) -> None:
        report.log("eval", {"step": step})
        report.log_pairs(step, {"margin": np.array([margin, math.nan])})

    def kept() -> tuple[list[tuple[int, float | None]], ...]:
        files = ("held_out_pairs.first.jsonl", "held_out_pairs.jsonl")
        return tuple([(line["step"], line["margin"]) for line in lines(tmp_path, name)] for name in files)

    with reporter(tmp_path) as report:
        evaluate(report, 0, 1.0)
        assert kept() == ([(0, 1.0), (0, None)],) * 2
        evaluate(report, 4, 2.0)
        evaluate(report, 8, 3.0)
    assert kept() == ([(0, 1.0), (0, None)], [(8, 3.0), (8, None)])
    with reporter(tmp_path, resumed_step=4) as report:
        evaluate(report, 6, 4.0)
    assert kept() == ([(0, 1.0), (0, None)], [(6, 4.0), (6, None)])
    with reporter(tmp_path) as report:
        evaluate(report, 0, 5.0)
    assert kept() == ([(0, 5.0), (0, None)],) * 2
    assert not list(tmp_path.glob("*.new"))


def test_each_held_out_set_has_files_of_its_own(tmp_path: Path) -> None:
    def evaluate(report: Reporter, step: int, *names: str) -> None:
        for name in names:
            report.log(evaluation_kind(name), {"step": step})
            report.log_pairs(step, {"margin": np.array([step])}, name)

    def steps(name: str) -> list[int]:
        return [lines(tmp_path, pairs_file(name, first=first))[0]["step"] for first in (True, False)]

    with reporter(tmp_path) as report:
        evaluate(report, 0, "", "chat")
        evaluate(report, 4, "", "chat")
    with reporter(tmp_path, resumed_step=4) as report:
        assert [(record["kind"], record["step"]) for record in report.evaluations()] == [
            *(("eval", 0), ("eval/chat", 0), ("eval", 4), ("eval/chat", 4))
        ]
        # One that came later has its first evaluation later.
        evaluate(report, 8, "chat", "code")
        evaluate(report, 12, "code")
    assert (steps(""), steps("chat"), steps("code")) == ([0, 4], [0, 8], [8, 12])
    assert {"held_out_pairs.code.jsonl", "held_out_pairs.code.first.jsonl"} <= {path.name for path in tmp_path.iterdir()}


def test_answers_beyond_the_step_of_a_resumed_run_are_dropped_and_a_new_run_puts_them_aside(tmp_path: Path) -> None:
    def answer(report: Reporter, step: int) -> None:
        report.log_samples(step, [{"prompt": number, "answer": "d\u00e9j\u00e0 vu", "ended": True} for number in range(2)])

    with reporter(tmp_path) as report:
        for step in (0, 3, 6):
            answer(report, step)
        assert report.has_samples(3)
    with reporter(tmp_path, resumed_step=4) as report:
        assert [report.has_samples(step) for step in (0, 3, 6)] == [True, True, False]
        answer(report, 6)
    assert [line["step"] for line in lines(tmp_path, "samples.jsonl")] == [0, 0, 3, 3, 6, 6]
    assert "d\u00e9j\u00e0 vu" in (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    reporter(tmp_path).close()
    assert len(lines(tmp_path, "samples.1.jsonl")) == 6
    assert not (tmp_path / "samples.jsonl").exists()


def test_what_is_said_of_many_pairs_is_never_in_memory_together(tmp_path: Path) -> None:
    # As text they are 7 MB, as records of Python 40.
    values = {name: np.arange(50_000, dtype=np.float32) for name in ("loss", "margin", "gamma")}
    with reporter(tmp_path) as report:
        tracemalloc.start()
        report.log_pairs(3, values)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    written = lines(tmp_path, "held_out_pairs.jsonl")
    assert (len(written), written[-1]) == (50_000, {"step": 3, "loss": 49_999.0, "margin": 49_999.0, "gamma": 49_999.0})
    assert most < 3e6


def test_a_disabled_reporter_touches_nothing(tmp_path: Path) -> None:
    with reporter(tmp_path / "logs", enabled=False) as report:
        report.log("train", {"step": 1, "loss": 1.0})
        report.log_samples(1, [{"prompt": 0}])
        report.log_figure("eval", pytest.fail, 1)
        assert not report.has_samples(1)
        assert report.evaluations() == []
        report.warn("something")
        report.say("something")
    assert list(tmp_path.iterdir()) == []


def test_a_log_dir_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--log-dir .*file"):
        reporter(tmp_path / "file")
