import time
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rmipo.reports import timers
from megatron_rmipo.reports.throughput import Throughput
from megatron_rmipo.reports.timers import PhaseTimer, StageClock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that goes only where a test moves it: ``clock.now``."""
    clock = SimpleNamespace(now=50.0)
    monkeypatch.setattr(timers, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_seconds_add_up_by_phase_and_time_between_phases_counts_for_none(clock: Any) -> None:
    timer = PhaseTimer()
    for waited in (0.25, 0.5):
        with timer.phase("data"):
            clock.now += waited
        clock.now += 7.0
        with timer.phase("gradient"):
            clock.now += 2.0
    assert timer.take() == {"data": 0.75, "gradient": 4.0}
    assert timer.take() == {}


def test_a_phase_that_fails_is_counted_and_raises(clock: Any) -> None:
    def work() -> None:
        clock.now += 3.0
        raise ValueError("fault")

    timer = PhaseTimer()
    with pytest.raises(ValueError, match="fault"), timer.phase("before"):
        work()
    assert timer.take() == {"before": 3.0}


def test_the_time_is_that_of_the_wall_clock() -> None:
    timer = PhaseTimer()
    with timer.phase("optimizer"):
        time.sleep(0.05)
    assert 0.05 <= timer.take()["optimizer"] < 5.0


def test_records_hold_means_per_step_and_the_rest() -> None:
    batch: Any = SimpleNamespace(num_pairs=3, num_tokens=70, num_padding=0, rows=[], cost=1e6)
    throughput = Throughput(world_size=2, peak_flops=None)
    throughput.add(batch, 2.0, {"data": 0.25, "gradient": 1.0, "optimizer": 0.5})
    throughput.add(batch, 4.0, {"data": 0.75, "before": 1.0, "gradient": 1.5, "optimizer": 0.5})
    record = throughput.take()
    assert {name: value for name, value in record.items() if "seconds" in name} == {
        "step_seconds": 3.0,
        "seconds/data": 0.5,
        "seconds/before": 0.5,
        "seconds/gradient": 1.25,
        "seconds/optimizer": 0.5,
        "seconds/other": 0.25,
    }
    assert record["pairs_per_second"] == 1.0
    throughput.add(batch, 1.0, {})
    assert throughput.take()["seconds/other"] == 1.0, "nothing of the record before is left"


def test_a_stage_is_busy_while_megatron_runs_packs_on_it(clock: Any) -> None:
    stage = StageClock()
    # As Megatron's schedules do it: a timer is named, then started or stopped, others around and between.
    stage("forward-backward", log_level=1).start(barrier=False)
    for name, seconds in (("forward-compute", 1.0), ("forward-send", 7.0), ("backward-compute", 2.0), ("forward-recv", 5.0)):
        stage(name, log_level=2).start()
        clock.now += seconds
        stage(name).stop()
    stage("forward-backward").stop()
    assert stage.busy_seconds == 3.0
