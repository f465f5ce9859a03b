"""A directory of checkpoints: names, what makes one complete, and which is the latest.

Layout::

    DIR/latest_checkpointed_iteration.txt   names the newest, replaced in one step after it is whole
    DIR/iter_0000100/                       or DIR/release/ for a converted model
        *.distcp .metadata metadata.json common.pt    Megatron-Core's torch_dist format
        hf/                                 Hugging Face config and tokenizer
        rmipo.json                          progress, configuration, and the size of every file above; written last
    DIR/iter_0000200.incomplete/            being written, or left by a run that died

No module of Megatron-Core is needed to read or check any of it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from megatron_rmipo.checkpoint.whole_directories import sync_directory
from megatron_rmipo.errors import CheckpointError

Iteration = int | Literal["release"]

TRACKER_NAME = "latest_checkpointed_iteration.txt"
RECORD_NAME = "rmipo.json"
ASSETS_NAME = "hf"
INCOMPLETE_SUFFIX = ".incomplete"
_FORMAT_VERSION = 1
_ITERATION_NAME = re.compile(r"iter_(\d{7,})")


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
    """

    iteration: Iteration
    train_state: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    layout: dict[str, int] = dataclasses.field(default_factory=dict)
    optimizer: str | None = None
    files: dict[str, int] = dataclasses.field(default_factory=dict)


def checkpoint_path(directory: Path, iteration: Iteration) -> Path:
    """Where the checkpoint of an iteration lies."""
    return Path(directory) / ("release" if iteration == "release" else f"iter_{iteration:07d}")


def hf_assets_directory(directory: Path, iteration: Iteration) -> Path:
    """Folder of a checkpoint that holds the Hugging Face config and tokenizer.

    Raises:
        CheckpointError: the checkpoint was made without them.
    """
    assets = checkpoint_path(directory, iteration) / ASSETS_NAME
    if not (assets / "config.json").is_file():
        raise CheckpointError(
            f"{assets.parent} holds no {ASSETS_NAME}/config.json: it was written by another program. Put the model's "
            f"config.json and tokenizer files in {assets}, or convert its Hugging Face original with convert_hf_to_megatron.py."
        )
    return assets


def write_record(path: Path, record: CheckpointRecord) -> None:
    """Write ``rmipo.json`` into a checkpoint whose other files are all there. Their sizes are taken now."""
    files = {name: size for name, size in _file_sizes(path) if name != RECORD_NAME}
    content = {"format_version": _FORMAT_VERSION, **dataclasses.asdict(dataclasses.replace(record, files=files))}
    with (path / RECORD_NAME).open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_record(path: Path) -> CheckpointRecord | None:
    """The record of a checkpoint, or None where it was written by another program.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        content = json.loads((path / RECORD_NAME).read_text(encoding="utf-8"))
        if content.pop("format_version") != _FORMAT_VERSION:
            raise CheckpointError(f"{path / RECORD_NAME} is of a newer format. Update megatron_rmipo to read this checkpoint.")
        return CheckpointRecord(**content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path / RECORD_NAME} is damaged ({error!r}).") from error


def read_metadata(path: Path) -> Metadata:
    """What torch's ``.metadata`` of a checkpoint says: tensors, their shapes and where their pieces lie.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return FileSystemReader(path).read_metadata()
    except Exception as error:
        # A truncated pickle raises whatever its bytes happen to say.
        raise CheckpointError(f"{path / '.metadata'} is missing or damaged ({error!r})") from error


def fault_of(path: Path) -> str | None:
    """Why a checkpoint cannot be loaded, or None where it is complete: every file is there, in its full size."""
    if not path.is_dir():
        return "it does not exist"
    try:
        record = read_record(path)
        needed = _sizes_by_metadata(path) if record is None else record.files
    except CheckpointError as error:
        return str(error)
    for name, size in needed.items():
        try:
            found = (path / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found < size or (record is not None and found != size):
            return f"{name} has {found} bytes instead of {size}"
    return None


def latest_complete_iteration(directory: Path) -> Iteration | None:
    """The checkpoint to go on from: the one the tracker file names if it is complete, else the newest complete one.

    Args:
        directory: holds ``iter_*`` or ``release`` and the tracker file.

    Returns:
        Its iteration, ``release`` for a converted model, or None where there is no complete checkpoint.
    """
    directory = Path(directory)
    tracked = _read_tracker(directory)
    if tracked is not None and fault_of(checkpoint_path(directory, tracked)) is None:
        return tracked
    for iteration in sorted(_iterations(directory), reverse=True):
        if fault_of(checkpoint_path(directory, iteration)) is None:
            return iteration
    return "release" if fault_of(checkpoint_path(directory, "release")) is None else None


def find_checkpoint(directory: Path, iteration: Iteration | None = None) -> tuple[Path, Iteration]:
    """A complete checkpoint: the one asked for, or the latest.

    Raises:
        CheckpointError: saying what is there and what is wrong with it.
    """
    directory = Path(directory)
    if iteration is None:
        iteration = latest_complete_iteration(directory)
        if iteration is not None:
            return checkpoint_path(directory, iteration), iteration
        raise CheckpointError(_nothing_complete(directory))
    path = checkpoint_path(directory, iteration)
    if fault := fault_of(path):
        there = [str(i) for i in sorted(_iterations(directory))] + (["release"] if (directory / "release").is_dir() else [])
        raise CheckpointError(f"{path} cannot be loaded: {fault}. In {directory} there are: {', '.join(there) or 'none'}.")
    return path, iteration


def begin_checkpoint(directory: Path, iteration: Iteration) -> Path:
    """Make the folder to write a checkpoint in. What died runs left half written is removed."""
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob("*" + INCOMPLETE_SUFFIX):
        shutil.rmtree(leftover, ignore_errors=True)
    path = checkpoint_path(directory, iteration)
    partial = path.with_name(path.name + INCOMPLETE_SUFFIX)
    partial.mkdir()
    return partial


def commit_checkpoint(directory: Path, iteration: Iteration, record: CheckpointRecord) -> Path:
    """Give a folder of :func:`begin_checkpoint`, now filled, its name, and make it the latest."""
    path = checkpoint_path(directory, iteration)
    partial = path.with_name(path.name + INCOMPLETE_SUFFIX)
    write_record(partial, record)
    sync_directory(partial)
    if path.exists():
        # Written before, by a run that went on from an earlier step; out of the way only now that its successor is whole.
        replaced = path.with_name(path.name + ".replaced" + INCOMPLETE_SUFFIX)
        os.replace(path, replaced)
        os.replace(partial, path)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        os.replace(partial, path)
    sync_directory(directory)
    tracker = directory / (TRACKER_NAME + ".tmp")
    with tracker.open("w", encoding="utf-8") as stream:
        stream.write(str(iteration))
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(tracker, directory / TRACKER_NAME)
    sync_directory(directory)
    return path


def abandon_checkpoint(directory: Path, iteration: Iteration) -> None:
    """Remove what was written of a checkpoint that failed."""
    path = checkpoint_path(directory, iteration)
    shutil.rmtree(path.with_name(path.name + INCOMPLETE_SUFFIX), ignore_errors=True)


def prune_checkpoints(directory: Path, keep_last: int, in_use: Path | None = None) -> None:
    """Remove all but the newest ``keep_last`` iterations; never ``release``, nor the one ``in_use`` lies in."""
    assert keep_last >= 1, keep_last
    for iteration in sorted(_iterations(directory))[:-keep_last]:
        path = checkpoint_path(directory, iteration)
        if in_use is None or path.resolve() not in in_use.resolve().parents:
            shutil.rmtree(path, ignore_errors=True)


def _iterations(directory: Path) -> Iterator[int]:
    for path in directory.glob("iter_*"):
        if (match := _ITERATION_NAME.fullmatch(path.name)) and path.is_dir():
            yield int(match[1])


def _read_tracker(directory: Path) -> Iteration | None:
    try:
        text = (directory / TRACKER_NAME).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    if text == "release":
        return "release"
    return int(text) if text.isdigit() else None


def _file_sizes(path: Path) -> Iterator[tuple[str, int]]:
    for item in sorted(path.rglob("*")):
        if item.is_file():
            yield item.relative_to(path).as_posix(), item.stat().st_size


def _sizes_by_metadata(path: Path) -> Mapping[str, int]:
    """Least sizes of the files of a checkpoint of another program, by what torch's metadata says lies in them."""
    sizes = dict.fromkeys(("metadata.json", "common.pt", ".metadata"), 1)
    if not (path / ".metadata").is_file():
        return sizes
    for item in read_metadata(path).storage_data.values():
        sizes[item.relative_path] = max(sizes.get(item.relative_path, 0), item.offset + item.length)
    return sizes


def _nothing_complete(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory} does not exist. Name a directory of checkpoints (with {TRACKER_NAME})."
    if (directory / "metadata.json").exists():
        return f"{directory} is one checkpoint, not a directory of them. Name its parent, {directory.parent}."
    candidates: list[Iteration] = sorted(_iterations(directory), reverse=True)
    if (directory / "release").is_dir():
        candidates.append("release")
    faults = [f"  {checkpoint_path(directory, i).name}: {fault_of(checkpoint_path(directory, i))}" for i in candidates[:5]]
    faults += [
        f"  {path.name}: was being written when its run ended" for path in sorted(directory.glob("*" + INCOMPLETE_SUFFIX))[:5]
    ]
    if not faults:
        return f"{directory} holds no checkpoint (no iter_* and no release folder)."
    return f"{directory} holds no complete checkpoint:\n" + "\n".join(faults)
