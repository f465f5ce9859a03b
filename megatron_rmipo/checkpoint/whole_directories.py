"""Directories that are written whole or not at all, and removed so that nobody waits for it."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from megatron_rmipo.errors import ConversionError
from megatron_rmipo.runtime.messages import warn

INCOMPLETE_SUFFIX = ".incomplete"
REMOVED_SUFFIX = ".removed"
# A shared file system may show another host's files late.
SEEN_WITHIN_SECONDS = 60.0


def check_output_directory(directory: Path, flag: str, ignoring: tuple[str, ...] = ()) -> None:
    """Check that ``directory`` can be written as a new one: it is missing or empty.

    Args:
        directory: where a model is to go.
        flag: the flag that named it, for the message.
        ignoring: endings of names that do not count.

    Raises:
        ConversionError: it is a file, or holds something.
    """
    given, directory = directory, Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise ConversionError(f"{flag} {given} is a file. Name a directory that does not exist yet.")
    names = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    entries = [name for name in names if not name.endswith(ignoring)]
    if entries:
        shown = ", ".join(entries[:4]) + (", ..." if len(entries) > 4 else "")
        raise ConversionError(f"{flag} {given} exists and holds {shown}. Name another directory, or remove this one.")


def check_space(directory: Path, num_bytes: int) -> None:
    """Check that ``num_bytes`` are free where ``directory`` is or will be.

    Raises:
        OSError: they are not, as the file system would say it.
    """
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise OSError(f"no space left: {num_bytes / 2**20:,.1f} MiB are needed, and {free / 2**20:,.1f} MiB are free there")


def is_seen(path: Path, deadline: float) -> bool:
    """Whether a path that another rank has made is there, waited for until ``deadline`` of the monotonic clock."""
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or the user's share of it, is full."""
    # By its text, which is what is left of it when another process met it.
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


def partial_path(path: Path) -> Path:
    """Where to write what is to be called ``path`` when it is whole: a name that no other process takes."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}{INCOMPLETE_SUFFIX}")


# One removal at a time; a process that ends waits for those that are left.
_REMOVER = ThreadPoolExecutor(1, thread_name_prefix="removal")


def discard(directory: Path) -> None:
    """Remove a directory in the background. Its name it loses at once, and gets one that :func:`remove_discarded` knows.

    What cannot be renamed or removed is told with a warning.
    """
    unique = partial_path(directory).name.removesuffix(INCOMPLETE_SUFFIX)
    discarded = directory.with_name(f".{unique}{REMOVED_SUFFIX}")
    try:
        os.replace(directory, discarded)
    except FileNotFoundError:
        return
    except OSError as error:
        warn(f"{directory} could not be removed: {error}. Remove it by hand.")
        return
    _REMOVER.submit(_remove, discarded)


def remove_discarded(folder: Path) -> None:
    """Remove in the background what a process that was killed had discarded in ``folder``."""
    for discarded in folder.glob("*" + REMOVED_SUFFIX):
        _REMOVER.submit(_remove, discarded)


def wait_for_removals() -> None:
    """Wait until nothing is left of what this process has discarded."""
    _REMOVER.submit(lambda: None).result()


def _remove(directory: Path) -> None:
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        pass  # another process removes it, too
    except OSError as error:
        shutil.rmtree(directory, ignore_errors=True)
        if directory.exists():
            warn(f"{directory} could not be removed: {error}. Remove it by hand.")


def remove_leftovers(path: Path) -> None:
    """Remove what processes of this host that are no more had begun to write as ``path``."""
    for partial in path.parent.glob(glob.escape(path.name) + ".*" + INCOMPLETE_SUFFIX):
        writer = partial.name.removeprefix(path.name + ".").removesuffix(INCOMPLETE_SUFFIX).rsplit("-", 2)
        if writer[0] == socket.gethostname() and writer[1].isdigit() and not psutil.pid_exists(int(writer[1])):
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A directory to fill, which gets its name when the block ends, and is removed when it raises.

    Args:
        directory: the final name; missing or empty.

    Yields:
        One beside it, of a name of its own. Leftovers of attempts that were killed are removed.
    """
    # Resolved, "." and "sub/.." have a name, and a link's target is replaced and not the link.
    directory = Path(directory).resolve()
    remove_leftovers(directory)
    partial = partial_path(directory)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_directory(partial)
        os.replace(partial, directory)
        sync_directory(directory.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries to the disk, so that a rename outlives a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
