"""``rmipo.json``: what a checkpoint says about itself, and the size and digest of each of its files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import megatron_rmipo
from megatron_rmipo.checkpoint.raw_files import file_digest
from megatron_rmipo.errors import CheckpointError

Iteration = int | Literal["release"]
# As a user asks for one: ``best`` is that of a run's best evaluation.
AskedIteration = Iteration | Literal["best"]

RECORD_NAME = "rmipo.json"
# 1 had no digests.
_FORMAT_VERSION = 2


class NewerCheckpointError(CheckpointError):
    """A checkpoint of a later version of this package: whole, so that nothing older may silently take its place."""


@dataclasses.dataclass(frozen=True)
class CheckpointRecord:
    """What a checkpoint says about itself, in ``rmipo.json``.

    Attributes:
        iteration: step it was written after, or ``release``.
        train_state: progress of the run; empty for a converted model.
        config: flags of the run by name; empty for a converted model.
        layout: sizes ``tp``, ``pp``, ``dp`` of the run that wrote it.
        optimizer: kind of optimizer state it holds, None for weights alone.
        files: size in bytes of every other file, by path inside the checkpoint.
        digests: sha256 of every other file as it was written; empty in checkpoints of format 1.
        adapter: what the adapter is that it holds, and of which model; None for a whole model.
    """

    iteration: Iteration
    train_state: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    layout: dict[str, int] = dataclasses.field(default_factory=dict)
    optimizer: str | None = None
    files: dict[str, int] = dataclasses.field(default_factory=dict)
    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    adapter: dict[str, Any] | None = None


def write_record(path: Path, record: CheckpointRecord, digests: Mapping[str, str]) -> None:
    """Write ``rmipo.json`` into a checkpoint whose other files are all there.

    Args:
        path: the checkpoint.
        record: its sizes and digests are filled in here.
        digests: sha256 of large files by name, taken from the bytes on their way to the disk. Files that are not among them,
            the small ones as a rule, are hashed as they lie there now.

    Raises:
        OSError: a file cannot be read, or the record not written.
    """
    files = {name: size for name, size in _file_sizes(path) if name != RECORD_NAME}
    all_digests = {name: digests.get(name) or file_digest(path / name) for name in files}
    filled = dataclasses.replace(record, files=files, digests=all_digests)
    content = {
        "format_version": _FORMAT_VERSION,
        "written_by": f"megatron_rmipo {megatron_rmipo.__version__}",
        **dataclasses.asdict(filled),
    }
    if content["adapter"] is None:
        # Versions that know no adapters read whole models.
        del content["adapter"]
    content["digest"] = _content_digest(content)
    with (path / RECORD_NAME).open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_record(path: Path) -> CheckpointRecord | None:
    """The record of a checkpoint, or None where there is none.

    Raises:
        NewerCheckpointError: a later version of this package wrote it.
        CheckpointError: it is damaged.
    """
    try:
        content = json.loads((path / RECORD_NAME).read_text(encoding="utf-8"))
        digest = content.pop("digest", None)
        if digest is not None and digest != _content_digest(content):
            raise CheckpointError(f"{path / RECORD_NAME} is damaged (it does not have the digest it was written with).")
        version, writer = int(content.pop("format_version")), content.pop("written_by", "another version of megatron_rmipo")
        if version == _FORMAT_VERSION and digest is None:
            raise CheckpointError(f"{path / RECORD_NAME} is damaged (its digest is missing).")
        unknown = sorted(set(content) - {field.name for field in dataclasses.fields(CheckpointRecord)})
        if version > _FORMAT_VERSION or unknown:
            fields = f", with {', '.join(unknown)}, which is not known here" if unknown else ""
            raise NewerCheckpointError(
                f"{path / RECORD_NAME} was written by {writer} in format {version}{fields}. This is megatron_rmipo "
                f"{megatron_rmipo.__version__}, which reads formats up to {_FORMAT_VERSION}: update it to go on from this "
                "checkpoint."
            )
        return CheckpointRecord(**content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path / RECORD_NAME} is damaged ({error!r}).") from error


def _content_digest(content: Mapping[str, Any]) -> str:
    # Through JSON once: what is read back has lists for tuples and text for keys.
    plain = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _file_sizes(path: Path) -> Iterator[tuple[str, int]]:
    for item in sorted(path.rglob("*")):
        if item.is_file():
            yield item.relative_to(path).as_posix(), item.stat().st_size
