"""Records in metrics.jsonl, TensorBoard and Weights & Biases; new and resumed runs."""

from __future__ import annotations

import json
import math
import sys
import tracemalloc
import types
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.reports.reporter import Reporter


def reporter(log_dir: Path, **options: Any) -> Reporter:
    return Reporter(log_dir, total_steps=20, config={"lr": 0.1}, stream=StringIO(), **options)


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
    assert not list(tmp_path.glob("*.tmp"))


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
    assert not list(tmp_path.glob("*.tmp"))


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
    with reporter(tmp_path / "logs", enabled=False, tensorboard_dir=tmp_path / "board", wandb_project="p") as report:
        report.log("train", {"step": 1, "loss": 1.0})
        report.warn("something")
        report.say("something")
    assert list(tmp_path.iterdir()) == []


def test_a_log_dir_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--log-dir .*file"):
        reporter(tmp_path / "file")


def test_tensorboard_holds_the_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_steps(tmp_path / "logs", 1, 3, tensorboard_dir=tmp_path / "board")
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [(event.step, pytest.approx(event.value)) for event in events.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
    ]


def test_missing_wandb_is_an_error_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"--wandb-project tries.*megatron-rmipo\[wandb\]"):
        reporter(tmp_path, wandb_project="tries")


class FakeWandbRun:
    """Stands in for the service: keeps what it is given."""

    def __init__(self, run_id: str) -> None:
        self.id = run_id
        self.logged: list[dict[str, Any]] = []
        self.step_metric: dict[str, str] = {}
        self.finished = False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.step_metric[name] = step_metric

    def log(self, record: dict[str, Any]) -> None:
        self.logged.append(record)

    def finish(self) -> None:
        self.finished = True


def test_wandb_gets_config_and_records_and_a_resumed_run_goes_on_with_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    runs: list[FakeWandbRun] = []

    def init(**options: Any) -> FakeWandbRun:
        calls.append(options)
        runs.append(FakeWandbRun(options["id"] or "fresh-id"))
        return runs[-1]

    module = types.ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    log_steps(tmp_path, 1, 2, wandb_project="tries", wandb_exp_name="first")
    log_steps(tmp_path, 2, 2, wandb_project="tries", resumed_step=1)
    assert calls[0]["config"] == {"lr": 0.1}
    assert (calls[0]["project"], calls[0]["name"], calls[0]["id"], calls[1]["id"]) == ("tries", "first", None, "fresh-id")
    assert runs[0].logged == [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 0.5}]
    assert runs[0].step_metric == {"*": "step"}
    assert runs[0].finished
