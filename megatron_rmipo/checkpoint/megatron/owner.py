"""One run at a time writes into a directory of checkpoints: its owner file says which, and a heartbeat that it lives."""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil  # type: ignore[import-untyped]

from megatron_rmipo.checkpoint.whole_directories import INCOMPLETE_SUFFIX, discard, partial_path, remove_discarded
from megatron_rmipo.errors import DirectoryTakenError
from megatron_rmipo.runtime.messages import warn

OWNER_NAME = "owner.json"
# A thread touches the file this often; an owner on another host whose file stays as it is for so long is taken for dead.
BEAT_SECONDS = 10.0
DEAD_SECONDS = 90.0
_JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "TORCHELASTIC_RUN_ID")


@dataclasses.dataclass(frozen=True)
class _Identity:
    """Who an owner is.

    Attributes:
        host: name of its host.
        namespace: the kernel's name for the space that ``pid`` counts in; containers of one host have different ones.
        pid: its process.
        started: when that process started, seconds since the epoch: a pid is used again.
        job: variable and value of the job it belongs to, or "".
        token: its own, random.
    """

    host: str
    namespace: str
    pid: int
    started: float
    job: str
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" ({self.job})" if self.job else "")


class DirectoryOwner:
    """The right to write checkpoints into a directory, held by one process (a run's first rank) until it is released or dies.

    A directory whose owner is dead is taken over, and what it was writing is removed. Dead is an owner of this host whose process
    is gone, and one of another host whose heartbeat has stopped, which may take ``DEAD_SECONDS`` to see.

    Args:
        directory: made if missing.

    Raises:
        DirectoryTakenError: another run writes there.
        OSError: the file system refuses.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._path = self.directory / OWNER_NAME
        self._identity = _own_identity()
        self._stop = threading.Event()
        content = json.dumps(dataclasses.asdict(self._identity), indent=2) + "\n"
        try:
            with self._path.open("x", encoding="utf-8") as stream:
                stream.write(content)
        except FileExistsError:
            self._take_over(content)
        self._remove_leftovers()
        atexit.register(self.release)
        inode = os.stat(self._path).st_ino
        threading.Thread(target=self._beat, args=(inode,), name="checkpoint-owner", daemon=True).start()

    def __enter__(self) -> DirectoryOwner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def check(self) -> None:
        """Make sure that nobody has taken the directory over, as happens to a process that stood still for long.

        Raises:
            DirectoryTakenError: somebody has.
        """
        found = _read(self._path)
        if found is None or found.token != self._identity.token:
            raise DirectoryTakenError(
                f"{self.directory} now belongs to {found or 'nobody'}: this run gave no sign of life for {DEAD_SECONDS:.0f} "
                f"seconds, or {self._path} was removed. It writes nothing more there."
            )

    def release(self) -> None:
        """Give the directory up. Releasing twice does nothing."""
        # Forked children inherit what is to be done at exit.
        if self._stop.is_set() or os.getpid() != self._identity.pid:
            return
        self._stop.set()
        atexit.unregister(self.release)
        found = _read(self._path)
        if found is not None and found.token == self._identity.token:
            self._path.unlink(missing_ok=True)

    def _take_over(self, content: str) -> None:
        draft = partial_path(self._path)
        draft.write_text(content, encoding="utf-8")
        try:
            other = _read(self._path)
            if _lives(other, self._path, draft):
                raise DirectoryTakenError(
                    f"{self.directory}: {other or 'another run'} writes checkpoints there. Wait for its end or end it, or give "
                    f"this run a directory of its own. (Should it be gone for good, remove {self._path}.)"
                )
            os.replace(draft, self._path)
        finally:
            draft.unlink(missing_ok=True)
        warn(f"{self.directory} is taken over from {other or 'a run that left no name'}, which is no more.")
        # Another process may have come to the same conclusion at the same time.
        self.check()

    def _remove_leftovers(self) -> None:
        # Nobody else is writing here now.
        remove_discarded(self.directory)
        for path in self.directory.glob("*" + INCOMPLETE_SUFFIX):
            if path.name.startswith(OWNER_NAME):  # of another that comes to take it over
                continue
            if path.is_dir():
                discard(path)
            else:
                path.unlink(missing_ok=True)

    def _beat(self, own: int) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                if os.stat(self._path).st_ino == own:
                    os.utime(self._path)
            except OSError:
                # A file system that stumbles once; that it is not ours any more shows at the next save.
                continue


def _own_identity() -> _Identity:
    job = next((f"{name} {os.environ[name]}" for name in _JOB_VARIABLES if os.environ.get(name)), "")
    started = psutil.Process().create_time()
    return _Identity(socket.gethostname(), _pid_namespace(), os.getpid(), started, job, secrets.token_hex(8))


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _read(path: Path) -> _Identity | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return _Identity(**content)
    except (OSError, ValueError, TypeError):
        return None


def _lives(owner: _Identity | None, path: Path, just_written: Path) -> bool:
    """Whether the owner of ``path`` lives; ``just_written`` tells the file system's own time."""
    here = _own_identity()
    if owner is not None and (owner.host, owner.namespace) == (here.host, here.namespace):
        return owner.pid != here.pid and _process_lives(owner)
    return _beats(path, just_written.stat().st_mtime, f"{owner or 'another run'}, which owns {path.parent},")


def _process_lives(owner: _Identity) -> bool:
    try:
        # Its start is told from the machine's, which a clock that is set moves a little.
        return abs(float(psutil.Process(owner.pid).create_time()) - owner.started) < 5
    except psutil.Error:
        return False


def _beats(path: Path, now: float, name: str) -> bool:
    try:
        first = path.stat().st_mtime
        if now - first > DEAD_SECONDS:
            return False
        needed = DEAD_SECONDS - max(0.0, now - first)
        warn(f"waiting for up to {needed:.0f} seconds to see whether {name} lives")
        deadline = time.monotonic() + needed
        while time.monotonic() < deadline:
            time.sleep(min(1.0, BEAT_SECONDS / 2))
            if path.stat().st_mtime != first:
                return True
    except FileNotFoundError:
        # It has ended meanwhile, and released what it owned.
        pass
    return False
