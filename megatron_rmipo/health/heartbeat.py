"""Signs of life: what each rank does, in a file a host, so that of ranks that wait for each other is known for whom.

Each rank of a host has a line of its own in the file, of one length, and a thread that writes it: nothing is exchanged, and a
rank that stands still, stopped or stuck, shows by the time of its line.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from megatron_rmipo.runtime.first_failure import lost_a_rank
from megatron_rmipo.runtime.messages import rank_label
from megatron_rmipo.torchrun import Launch

FOLDER = "heartbeats"
BEAT_SECONDS = 10.0
# A thread may be late on a busy host.
SILENT_SECONDS = 2.5 * BEAT_SECONDS
_LINE_BYTES = 128
_SHOWN = 4


class Beat(NamedTuple):
    """What a rank's line says.

    Attributes:
        rank: its number.
        host: its host.
        step: the step it is in, counted from 1.
        doing: what it does there: a phase of a step, or what lies between two.
        since: when it began that, seconds since 1970.
        alive: when the line was written.
    """

    rank: int
    host: str
    step: int
    doing: str
    since: float
    alive: float


class Heartbeat:
    """Writes this rank's line every few seconds while it is entered, and at its end.

    Args:
        log_dir: of the run; the lines of a host are ``heartbeats/HOST-RANK.txt`` there, RANK its first one.
        launch: this process's place among the ranks.
    """

    def __init__(self, log_dir: Path, launch: Launch) -> None:
        self._folder, self._launch = log_dir / FOLDER, launch
        self._state = (0, "start", time.time())
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._file: int | None = None

    def enter(self, step: int, doing: str) -> None:
        """Say what this rank does from now on. Nothing is written for it."""
        self._state = (step, doing, time.time())

    def doing(self, what: str) -> None:
        """The same, in the step that it is in."""
        self.enter(self._state[0], what)

    def __enter__(self) -> Heartbeat:
        first = self._launch.rank - self._launch.local_rank
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._folder / f"{socket.gethostname()}-{first}.txt", os.O_CREAT | os.O_WRONLY, 0o644)
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        if error is None:
            self.doing("end")
        self._write()
        if self._file is not None:
            os.close(self._file)
        if error is not None and lost_a_rank(error) and self._launch.local_rank == 0:
            for line in who_is_behind(read_beats(self._folder), time.time()):
                print(f"{rank_label()}{line}", file=sys.stderr, flush=True)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self._write()

    def _write(self) -> None:
        step, doing, since = self._state
        text = f"rank {self._launch.rank} step {step} {doing} since {_clock(since)} alive {_clock(time.time())}"
        line = text[: _LINE_BYTES - 1].ljust(_LINE_BYTES - 1) + "\n"
        # What watches a run does not end it.
        with contextlib.suppress(OSError):
            if self._file is not None:
                os.pwrite(self._file, line.encode("ascii", "replace"), self._launch.local_rank * _LINE_BYTES)


def forget_heartbeats(log_dir: Path) -> None:
    """Remove what an earlier start left. One rank calls it, before any writes."""
    for path in (log_dir / FOLDER).glob("*.txt"):
        path.unlink(missing_ok=True)


def read_beats(folder: Path) -> list[Beat]:
    """The line of every rank whose host writes here, by rank; what cannot be read is left out."""
    return sorted(beat for path in folder.glob("*.txt") for beat in _beats_of(path))


def who_is_behind(beats: list[Beat], now: float) -> list[str]:
    """The ranks that others may be waiting for: those that stand still; where none does, those that are least far.

    Args:
        beats: of the ranks.
        now: seconds since 1970.
    """
    silent = [beat for beat in beats if now - beat.alive > SILENT_SECONDS]
    if silent:
        return _lines(silent, "shows no sign of life", now)
    running = [beat for beat in beats if beat.doing != "end"]
    least = min((beat.step for beat in running), default=0)
    behind = [beat for beat in running if beat.step == least]
    # All are in one step: what differs is what they do there; the one thing that few do is the odd one.
    doing = [beat.doing for beat in behind]
    fewest = min(map(doing.count, doing), default=0)
    odd = [beat for beat in behind if doing.count(beat.doing) == fewest]
    return _lines(odd, "is the furthest behind or does what others do not", now) if len(odd) < len(beats) else []


def _lines(beats: list[Beat], what: str, now: float) -> list[str]:
    lines = [
        f"heartbeat: rank {beat.rank} on {beat.host} {what}: step {beat.step}, {beat.doing} for {now - beat.since:.0f} s, "
        f"last heard of {now - beat.alive:.0f} s ago"
        for beat in beats[:_SHOWN]
    ]
    return lines + ([f"heartbeat: and {len(beats) - _SHOWN} more"] if len(beats) > _SHOWN else [])


def _beats_of(path: Path) -> Iterator[Beat]:
    host, lines = path.stem.rpartition("-")[0], ""
    with contextlib.suppress(OSError):
        lines = path.read_text(encoding="ascii", errors="replace")
    for line in lines.splitlines():
        words = line.strip("\0 ").split()
        # A rank that has not come yet has no line, or zeros in its place; one that writes at this moment may have half of one.
        with contextlib.suppress(ValueError, IndexError):
            yield Beat(int(words[1]), host, int(words[3]), words[4], _seconds(words[6]), _seconds(words[8]))


def _clock(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


def _seconds(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()
