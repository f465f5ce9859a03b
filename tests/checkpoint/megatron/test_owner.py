"""Two runs and one directory of checkpoints: a second live one is refused, a dead one's place is taken."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_rmipo.checkpoint.megatron import owner
from megatron_rmipo.checkpoint.megatron.commit import begin_checkpoint
from megatron_rmipo.checkpoint.megatron.owner import OWNER_NAME, DirectoryOwner
from megatron_rmipo.checkpoint.whole_directories import REMOVED_SUFFIX, wait_for_removals
from megatron_rmipo.errors import CheckpointError

HOLD = """
import sys, time
from pathlib import Path
from megatron_rmipo.checkpoint.megatron.commit import begin_checkpoint
from megatron_rmipo.checkpoint.megatron.owner import DirectoryOwner
held = DirectoryOwner(Path(sys.argv[1]))
begin_checkpoint(Path(sys.argv[1]), 8)
print("held", flush=True)
time.sleep(100)
"""


def write_foreign_owner(directory: Path, age: float) -> Path:
    """An owner on another host, whose last heartbeat was so many seconds ago."""
    there = dataclasses.replace(owner._own_identity(), host="node-17", job="SLURM_JOB_ID 4711")
    path = directory / OWNER_NAME
    path.write_text(json.dumps(dataclasses.asdict(there)))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_released_at_the_end_and_kept_alive_until_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.02)
    with DirectoryOwner(tmp_path / "run") as held:
        path = tmp_path / "run" / OWNER_NAME
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        held.check()
    assert not path.exists()
    held.release()


def test_a_live_run_is_refused_and_a_killed_one_taken_over(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    environment = {**os.environ, "SLURM_JOB_ID": "4711", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=rf"process {other.pid} on .*\(SLURM_JOB_ID 4711\) writes checkpoints there"):
            DirectoryOwner(tmp_path)
        assert len(list(tmp_path.glob("iter_0000008.*.incomplete"))) == 1, "what the live one writes stays"
        other.send_signal(signal.SIGKILL)
        other.wait()
    discarded = tmp_path / f".iter_0000004.node-17-11-ab{REMOVED_SUFFIX}"
    (discarded / "hf").mkdir(parents=True)
    with DirectoryOwner(tmp_path):
        wait_for_removals()
        assert [path.name for path in tmp_path.iterdir()] == [OWNER_NAME]
    assert f"taken over from process {other.pid}" in capfd.readouterr().err


def test_another_host_is_judged_by_its_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.02)
    path = write_foreign_owner(tmp_path, age=owner.DEAD_SECONDS + 1)
    with DirectoryOwner(tmp_path):
        pass
    monkeypatch.setattr(owner, "DEAD_SECONDS", 1.0)
    write_foreign_owner(tmp_path, age=0.1)
    started = time.monotonic()
    with DirectoryOwner(tmp_path):
        assert 0.5 < time.monotonic() - started < 5
    monkeypatch.setattr(owner, "DEAD_SECONDS", 60.0)
    path = write_foreign_owner(tmp_path, age=0.1)
    beat = threading.Timer(0.3, os.utime, [path])
    beat.start()
    with pytest.raises(CheckpointError, match=r"on node-17 \(SLURM_JOB_ID 4711\) writes checkpoints there.*owner\.json"):
        DirectoryOwner(tmp_path)
    beat.join()


def test_one_that_was_taken_over_writes_nothing_more(tmp_path: Path) -> None:
    with DirectoryOwner(tmp_path) as held:
        path = write_foreign_owner(tmp_path, age=0)
        with pytest.raises(CheckpointError, match=r"now belongs to .* on node-17"):
            held.check()
    assert path.exists(), "it is not this one's to remove"


def test_names_of_what_is_being_written_are_unique(tmp_path: Path) -> None:
    assert begin_checkpoint(tmp_path, 4) != begin_checkpoint(tmp_path, 4)
