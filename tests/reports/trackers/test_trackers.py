"""What trackers are told of a run, new and resumed; services through stand-ins that refuse what the real ones would."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rmipo.config.schema import LoggingConfig
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.reports.pictures.held_out import draw_held_out
from megatron_rmipo.reports.reporter import Reporter
from megatron_rmipo.reports.trackers.base import as_markdown
from megatron_rmipo.reports.trackers.opening import open_trackers, tracker_packages

PAIRS = {
    "rewards/margins": np.array([0.5, 1.0, math.nan], dtype=np.float32),
    "logps/chosen": np.array([-1.0, -2.0, -1.5], dtype=np.float32),
    "logps/rejected": np.array([-2.0, -1.0, -3.0], dtype=np.float32),
}
ANSWERS = [{"prompt": 0, "text": "a | b", "answer": "one\ntwo"}, {"prompt": 1, "text": "c", "answer": ""}]


def run_steps(log_dir: Path, first: int, last: int, flags: LoggingConfig, resumed_step: int | None = None) -> str:
    """A run's part, with a picture and answers at its last step; what its screen shows."""
    stream = StringIO()
    trackers = open_trackers(flags, log_dir, {"lr": 0.1}, resumed_step)
    with Reporter(log_dir, total_steps=9, trackers=trackers, resumed_step=resumed_step, stream=stream) as report:
        for step in range(first, last + 1):
            report.log("train", {"step": step, "loss": 1.0 / step, "grad_norm": math.inf})
        for _ in range(2):
            report.log_figure("eval/pairs", lambda: draw_held_out("step", PAIRS), last)
        report.log_samples(last, ANSWERS)
    return stream.getvalue()


def test_tensorboard_holds_scalars_pictures_and_texts_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = LoggingConfig(tensorboard_dir=str(tmp_path / "board"))
    run_steps(tmp_path / "logs", 1, 4, flags)
    run_steps(tmp_path / "logs", 3, 5, flags, resumed_step=2)
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(step, pytest.approx(1 / step)) for step in range(1, 6)]
    assert {event.step for event in events.Images("eval/pairs")} == {5}
    answers = events.Tensors("samples/text_summary")[-1]
    assert answers.tensor_proto.string_val[0].decode() == as_markdown(
        [{name: str(value) for name, value in row.items()} for row in ANSWERS]
    )


def test_a_table_keeps_its_cells_whatever_stands_in_them() -> None:
    rows = [{"text": "a | b", "answer": "one\ntwo"}]
    assert as_markdown(rows) == "| text | answer |\n| --- | --- |\n| a \\| b | one<br>two |"


@dataclasses.dataclass
class WandbRun:
    """Stands in for the service: a step of its own would have to grow, as the service's does."""

    id: str
    logged: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    step_metric: dict[str, str] = dataclasses.field(default_factory=dict)
    finished: bool = False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.step_metric[name] = step_metric

    def log(self, record: dict[str, Any]) -> None:
        assert not self.finished
        self.logged.append(record)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = types.ModuleType("wandb")
    module.calls, module.runs = [], {}

    def init(**options: Any) -> WandbRun:
        module.calls.append(options)
        run_id = options["id"] or f"id-{len(module.runs)}"
        run = module.runs.setdefault(run_id, WandbRun(run_id))
        run.finished = False
        return run

    module.init = init
    module.Image = lambda figure: ("image", len(figure.axes))
    module.Table = lambda columns, data: ("table", columns, data)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_resumed_run_of_wandb_goes_on_with_its_id_and_its_steps(tmp_path: Path, wandb: Any) -> None:
    flags = LoggingConfig(wandb_project="tries", wandb_exp_name="first")
    run_steps(tmp_path, 1, 3, flags)
    run_steps(tmp_path, 3, 4, flags, resumed_step=2)
    assert [(call["project"], call["name"], call["id"], call["resume"]) for call in wandb.calls] == [
        *(("tries", "first", None, "allow"), ("tries", "first", "id-0", "allow"))
    ]
    assert wandb.calls[0]["config"] == {"lr": 0.1}
    (run,) = wandb.runs.values()
    losses = [(record["step"], record["train/loss"]) for record in run.logged if "train/loss" in record]
    assert losses == [(step, 1 / step) for step in (1, 2, 3, 3, 4)]
    # Each record names the step, by which the service draws all of them.
    assert run.step_metric == {"*": "step"}
    assert all("step" in record and not any(name.endswith("/step") for name in record) for record in run.logged)
    assert [record["eval/pairs"] for record in run.logged if "eval/pairs" in record] == [("image", 2)] * 4
    columns = ["prompt", "text", "answer"]
    table = ("table", columns, [["0", "a | b", "one\ntwo"], ["1", "c", ""]])
    assert [(record["step"], record["samples"]) for record in run.logged if "samples" in record] == [(3, table), (4, table)]
    assert run.finished


def test_a_new_run_in_the_same_directory_is_another_run_of_wandb(tmp_path: Path, wandb: Any) -> None:
    flags = LoggingConfig(wandb_project="tries")
    run_steps(tmp_path, 1, 2, flags)
    run_steps(tmp_path, 1, 1, flags)
    run_steps(tmp_path, 2, 2, flags, resumed_step=1)
    assert [call["id"] for call in wandb.calls] == [None, None, "id-1"]


class StandInMlflow(types.ModuleType):
    """Stands in for MLflow's fluent interface: one run is active at a time."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.experiment = self.active = ""
        self.runs: dict[str, dict[str, Any]] = {}

    def set_experiment(self, name: str) -> None:
        self.experiment = name

    def start_run(self, run_id: str | None) -> Any:
        assert not self.active
        self.active = run_id or f"run-{len(self.runs)}"
        self.runs.setdefault(self.active, {"metrics": [], "files": {}})
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=self.active))

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        assert all(math.isfinite(value) for value in values.values())
        self.runs[self.active]["metrics"].append((step, values))

    def _keep(self, content: Any, name: str) -> None:
        self.runs[self.active]["files"][name] = content

    log_dict = log_text = log_figure = _keep

    def end_run(self) -> None:
        self.active = ""


def test_a_run_of_mlflow_has_metrics_and_files_and_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = StandInMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    flags = LoggingConfig(mlflow_experiment="tries")
    run_steps(tmp_path, 1, 2, flags)
    run_steps(tmp_path, 3, 3, flags, resumed_step=2)
    run_steps(tmp_path, 1, 1, flags)
    assert (mlflow.experiment, mlflow.active, list(mlflow.runs)) == ("tries", "", ["run-0", "run-1"])
    assert [(step, values["train/loss"]) for step, values in mlflow.runs["run-0"]["metrics"]] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    files = mlflow.runs["run-0"]["files"]
    assert files["config.yaml"] == {"lr": 0.1}
    assert {"eval/pairs/step_0000002.png", "eval/pairs/step_0000003.png", "samples/step_0000003.md"} <= set(files)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"wandb_project": "tries"}, r"--wandb-project tries.*megatron-rmipo\[wandb\]"),
        ({"mlflow_experiment": "tries"}, r"--mlflow-experiment tries.*megatron-rmipo\[mlflow\]"),
    ],
)
def test_a_missing_package_is_an_error_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, str], told: str
) -> None:
    logging = LoggingConfig(**flags)  # type: ignore[arg-type]
    ((package, flag),) = tracker_packages(logging).items()
    assert told.startswith(flag)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=told):
        open_trackers(logging, tmp_path, {}, None)


def test_without_matplotlib_there_are_no_pictures_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: Any
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    said = run_steps(tmp_path, 1, 1, LoggingConfig(wandb_project="tries"))
    assert said.count("note: trackers get no pictures: pictures are drawn by the package matplotlib, which is missing.") == 1
    assert not any("eval/pairs" in record for record in wandb.runs["id-0"].logged)
