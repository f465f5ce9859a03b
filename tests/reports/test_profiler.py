import gzip
import json
from pathlib import Path

import pytest
import torch

from megatron_rmipo.reports.profiler import StepProfiler
from megatron_rmipo.runtime.tracing import trace_range


def names(path: Path) -> list[str]:
    """Names of the trace's ranges, in their order in time."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    ranges = [event for event in events if event.get("cat") == "user_annotation"]
    return [event["name"] for event in sorted(ranges, key=lambda event: event["ts"])]


def run_steps(profiler: StepProfiler, first: int, last: int) -> None:
    for number in range(first, last + 1):
        with profiler.step(number), trace_range(f"work of {number}"):
            torch.ones(3).sum()


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (1, ["ProfilerStep#3", "work of 3", "ProfilerStep#4", "work of 4"]),
        (3, ["ProfilerStep#3", "work of 3", "ProfilerStep#4", "work of 4"]),
        (4, ["ProfilerStep#4", "work of 4"]),
    ],
    ids=["from the beginning", "resumed before them", "resumed among them"],
)
def test_the_chosen_steps_are_traced(tmp_path: Path, first: int, expected: list[str]) -> None:
    path, said = tmp_path / "profile" / "rank0.json.gz", []
    with StepProfiler(path, range(3, 5), said.append) as profiler:
        run_steps(profiler, first, 4)
        assert path.exists(), "written when the last one is over"
        run_steps(profiler, 5, 6)
    assert names(path) == expected
    assert said == [f"trace of steps {max(first, 3)} to 4: {path}"]
    assert [file.name for file in path.parent.iterdir()] == ["rank0.json.gz"]


def test_a_run_that_stops_among_the_steps_writes_what_it_has_when_it_is_left(tmp_path: Path) -> None:
    path, said = tmp_path / "rank0.json.gz", []
    with StepProfiler(path, range(2, 9), said.append) as profiler:
        run_steps(profiler, 1, 3)
        profiler.stop()
        with trace_range("checkpoint"):
            torch.ones(3).sum()
        assert not path.exists()
    assert names(path) == ["ProfilerStep#2", "work of 2", "ProfilerStep#3", "work of 3"]
    assert said == [f"trace of steps 2 to 3: {path}"]


def test_a_run_that_fails_among_the_steps_writes_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "rank0.json.gz"
    profiler = StepProfiler(path, range(1, 9), print)
    with pytest.raises(ValueError, match="fault"), profiler, profiler.step(1):
        raise ValueError("fault")
    assert names(path) == ["ProfilerStep#1"]


@pytest.mark.parametrize("steps", [range(0), range(4, 6), range(5, 7)], ids=["none", "one step ahead", "further ahead"])
def test_no_step_no_trace(tmp_path: Path, steps: range) -> None:
    said: list[str] = []
    with StepProfiler(tmp_path / "profile" / "rank0.json.gz", steps, said.append) as profiler:
        run_steps(profiler, 1, 3)
    assert not list((tmp_path / "profile").glob("*"))
    assert said == []
    assert not torch.autograd._profiler_enabled()


def test_a_trace_that_cannot_be_written_costs_no_training(tmp_path: Path) -> None:
    path, said = tmp_path / "rank0.json.gz", []
    path.mkdir()
    (path / "occupied").touch()
    with StepProfiler(path, range(1, 2), said.append) as profiler:
        run_steps(profiler, 1, 3)
    assert len(said) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["rank0.json.gz"]
    assert said[0].startswith(f"warning: {path}: the trace of steps 1 to 1 cannot be written: ")


def test_a_directory_that_cannot_be_made_costs_no_training_either(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    said: list[str] = []
    with StepProfiler(tmp_path / "logs" / "profile" / "rank0.json.gz", range(1, 2), said.append) as profiler:
        run_steps(profiler, 1, 3)
    assert len(said) == 1
    assert "the trace of steps 1 to 1 cannot be written: " in said[0]
