"""Traces and phase seconds of whole runs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rmipo.command import STOPPED
from tests.harness import run_distributed
from tests.integration.data import write_pairs
from tests.integration.test_training import flags, output_of, records, run

pytestmark = pytest.mark.dist


def ranges(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Name of a range of the trace -> its (start, end) in microseconds, each time it occurs."""
    found: dict[str, list[tuple[float, float]]] = {}
    for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]:
        if event.get("cat") == "user_annotation":
            found.setdefault(event["name"], []).append((event["ts"], event["ts"] + event["dur"]))
    return found


def steps_of(path: Path) -> list[int]:
    return sorted(int(name.partition("#")[2]) for name in ranges(path) if name.startswith("ProfilerStep#"))


def within(inner: tuple[float, float], outer: list[tuple[float, float]]) -> bool:
    return any(start <= inner[0] and inner[1] <= end for start, end in outer)


def test_chosen_steps_are_traced_on_the_chosen_rank_alone(tmp_path: Path) -> None:
    save = tmp_path / "run"
    chosen: dict[str, Any] = {"profile": True, "profile_step_start": 1, "profile_step_end": 3, "profile_ranks": 1}
    arguments = flags(write_pairs(tmp_path / "pairs"), save, train_iters=4, log_interval=2, **chosen)
    assert run_distributed(run, 2, arguments) == [0, 0]
    assert [path.name for path in (save / "logs" / "profile").iterdir()] == ["rank1.json.gz"]
    found = ranges(save / "logs" / "profile" / "rank1.json.gz")
    assert {name for name in found if name.startswith("ProfilerStep#")} == {"ProfilerStep#2", "ProfilerStep#3"}
    steps = found["ProfilerStep#2"] + found["ProfilerStep#3"]
    for phase in ("data", "before", "gradient", "optimizer"):
        assert len(found[phase]) == 2, phase
        assert all(within(one, steps) for one in found[phase]), phase
    assert len(found["unconditional pass"]) == 2
    assert all(within(one, found["before"]) for one in found["unconditional pass"])
    shown = records(save)
    assert len(shown) == 2
    for record in shown:
        parts = {name: value for name, value in record.items() if name.startswith("seconds/")}
        assert parts.keys() == {f"seconds/{name}" for name in ("data", "before", "gradient", "optimizer", "other")}
        assert sum(parts.values()) == pytest.approx(record["step_seconds"], rel=1e-9)
        assert min(parts.values()) > 0


def test_a_run_that_stops_among_the_steps_writes_what_it_has(tmp_path: Path) -> None:
    prefix, save = write_pairs(tmp_path / "pairs"), tmp_path / "run"
    trace = save / "logs" / "profile" / "rank0.json.gz"
    chosen: dict[str, Any] = {"profile": True, "profile_step_start": 0, "profile_step_end": 3, "load": save, "split": None}
    code, output = run_distributed(output_of, 1, run, flags(prefix, save, exit_interval=2, **chosen))[0]
    assert code == STOPPED, output
    assert f"trace of steps 1 to 2: {trace}" in output
    assert steps_of(trace) == [1, 2]
    assert run_distributed(run, 1, flags(prefix, save, exit_interval=4, **chosen)) == [STOPPED]
    assert steps_of(trace) == [3]
    code, output = run_distributed(output_of, 1, run, flags(prefix, save, **chosen))[0]
    assert code == 0, output
    assert "nothing is profiled: the run goes on from step 4, after --profile-step-end 3" in output
    assert steps_of(trace) == [3]


@pytest.mark.parametrize(
    ("objective", "pass_name"),
    [("alpha_dpo", "batch pass"), ("kto", "mismatched pass"), ("epsilon_dpo", "reference pass")],
)
def test_every_pass_before_the_gradient_has_its_name(tmp_path: Path, objective: str, pass_name: str) -> None:
    save = tmp_path / "run"
    chosen: dict[str, Any] = {"profile": True, "profile_step_start": 0, "profile_step_end": 1, "train_iters": 1}
    arguments = flags(write_pairs(tmp_path / "pairs"), save, objective=objective, lr_warmup_iters=None, split=None, **chosen)
    assert run_distributed(run, 1, arguments) == [0]
    found = ranges(save / "logs" / "profile" / "rank0.json.gz")
    assert {name for name in found if name.endswith(" pass")} == {pass_name}
    assert all(within(one, found["before"]) for one in found[pass_name])


def test_steps_beyond_the_end_of_an_epoch_are_refused(tmp_path: Path) -> None:
    arguments = flags(write_pairs(tmp_path / "pairs"), tmp_path / "run", train_iters=None, epochs=1, profile=True)
    code, output = run_distributed(output_of, 1, run, arguments)[0]
    assert code == 1
    assert "--profile-step-end 12 lies beyond the run's" in output
