"""Records that a long command keeps as it goes, so that one that was killed goes on where it stood."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_rmipo.errors import ConfigError, DataError


class KeptRecords:
    """A file of one JSON object a line: first the settings they were made with, then a record each.

    A line that a kill cut off is dropped. One process at a time writes. A context manager.

    Args:
        path: the file; made if it is not there, and its folders.
        settings: on what the records depend; a file with others is refused.

    Attributes:
        records: what is kept, key -> record.

    Raises:
        ConfigError: the file was made with other settings, another process has it, or it cannot be written.
        DataError: the file is damaged.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror}. Name another place.") from error
        try:
            self._lock()
            self._read(settings)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> KeptRecords:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep a record, on the disk when this returns."""
        self._write({"key": key, **record})
        self.records[key] = dict(record)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{self.path}: another process writes it. Wait for that one, or name another place.") from None
        except OSError:
            pass  # a file system without locks

    def _read(self, settings: Mapping[str, Any]) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        # Text that is no whole line is what a kill left.
        self._file.truncate(whole)
        lines = content[:whole].splitlines()
        now = json.loads(json.dumps(settings))
        if not lines:
            self._write({"settings": now})
            return
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if number == 1:
                    self._compare(record["settings"], now)
                else:
                    self.records[record.pop("key")] = record
            except (ValueError, KeyError, TypeError, AttributeError):
                raise DataError(f"{self.path}: line {number}: not a record that was kept here. Remove the file.") from None

    def _compare(self, then: dict[str, Any], now: dict[str, Any]) -> None:
        names = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
        if names:
            lines = [f"  {name}: {then.get(name)} then, {now.get(name)} now" for name in names]
            raise ConfigError(
                "\n".join([f"{self.path}: what is kept there was made with other settings:", *lines])
                + "\nUse the same settings to go on, remove that file to begin anew, or name another place."
            )

    def _write(self, record: Mapping[str, Any]) -> None:
        # Behind what is there: the file is opened to append.
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
