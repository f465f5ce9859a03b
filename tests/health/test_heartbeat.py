"""Signs of life, and who is named where some wait for others."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_rmipo.health import heartbeat
from megatron_rmipo.health.heartbeat import FOLDER, Beat, Heartbeat, forget_heartbeats, read_beats, who_is_behind
from megatron_rmipo.torchrun import Launch


def test_ranks_of_a_host_share_a_file_and_those_of_another_have_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.02)
    with Heartbeat(tmp_path, Launch(9, 16, 1, 8)) as late, Heartbeat(tmp_path, Launch(0, 16, 0, 8)) as first:
        with contextlib.suppress(ValueError), Heartbeat(tmp_path, Launch(11, 16, 3, 8)) as failed:
            failed.enter(6, "gradient")
            raise ValueError("fault")
        first.enter(7, "before")
        late.enter(6, "data")
        deadline = time.monotonic() + 20
        while [(one.rank, one.step, one.doing) for one in read_beats(tmp_path / FOLDER)] != [
            (0, 7, "before"),
            (9, 6, "data"),
            (11, 6, "gradient"),
        ]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert len(list((tmp_path / FOLDER).glob("*.txt"))) == 2
    assert [one.doing for one in read_beats(tmp_path / FOLDER)] == ["end", "end", "gradient"]
    forget_heartbeats(tmp_path)
    assert read_beats(tmp_path / FOLDER) == []


def test_who_stands_still_is_named_before_who_is_behind() -> None:
    beats = [Beat(rank, "node0", 5, "gradient", 1000.0, 1990.0) for rank in range(4)]
    assert who_is_behind(beats, 2000.0) == []
    waiting = [*beats[:2], beats[2]._replace(doing="data"), beats[3]]
    (line,) = who_is_behind(waiting, 2000.0)
    assert line.startswith(
        "heartbeat: rank 2 on node0 is the furthest behind or does what others do not: step 5, data for 1000 s"
    )
    earlier = [*waiting[:3], beats[3]._replace(step=4)]
    assert [line.split()[2] for line in who_is_behind(earlier, 2000.0)] == ["3"]
    silent = [beats[0]._replace(alive=1900.0, host="node7"), *earlier[1:]]
    assert who_is_behind(silent, 2000.0) == [
        "heartbeat: rank 0 on node7 shows no sign of life: step 5, gradient for 1000 s, last heard of 100 s ago"
    ]


def test_a_rank_that_loses_another_says_whom(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Heartbeat(tmp_path, Launch(1, 2, 1, 2)) as other:
        other.enter(3, "gradient")
    other_file = next((tmp_path / FOLDER).glob("*.txt"))
    text = other_file.read_text().replace(" end ", " gradient ")
    other_file.with_name("node7-8.txt").write_text(text.replace("step 3", "step x") + "rank 9 step")
    other_file.with_name("node8-16.txt").mkdir()
    long_ago = time.strftime("alive %Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() - 500))
    other_file.write_text(text[: text.index("alive")] + long_ago.ljust(len(text) - text.index("alive") - 1) + "\n")
    with pytest.raises(dist.DistStoreError), Heartbeat(tmp_path, Launch(0, 2, 0, 2)):
        raise dist.DistStoreError("gone")
    assert "heartbeat: rank 1 on " in capsys.readouterr().err


def test_a_disk_that_takes_no_lines_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("no folder")
    with Heartbeat(tmp_path, Launch()) as beat:
        beat.enter(1, "data")
