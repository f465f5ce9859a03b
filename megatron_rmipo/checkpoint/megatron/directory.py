"""A directory of checkpoints: names, what makes one complete, and which is the one to go on from.

Layout::

    DIR/latest_checkpointed_iteration.txt   names the one to go on from
    DIR/best_checkpointed_iteration.txt     names that of the best evaluation, of runs that keep it
    DIR/iter_0000100/                       or DIR/release/ for a converted model
        *.distcp .metadata metadata.json              Megatron-Core's torch_dist format
        common.pt                                     of it, too, where Megatron-Core before 0.19 wrote it
        hf/                                 Hugging Face config and tokenizer
        rmipo.json                          progress, configuration, size and digest of every file above; written last
    DIR/iter_0000300.set_aside/             of a branch that was left, or damaged; never taken, never removed
    DIR/iter_0000200.HOST-PID-RANDOM.incomplete/    being written, or left by a run that died
    DIR/owner.json                          the run that writes here

No module of Megatron-Core is needed to read or check any of it. What writes is in :mod:`.commit`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from megatron_rmipo.checkpoint.megatron.record import RECORD_NAME, AskedIteration, Iteration, NewerCheckpointError, read_record
from megatron_rmipo.checkpoint.megatron.unpickling import restricted_unpickling
from megatron_rmipo.checkpoint.raw_files import file_digest
from megatron_rmipo.checkpoint.whole_directories import INCOMPLETE_SUFFIX
from megatron_rmipo.errors import CheckpointError

TRACKER_NAME = "latest_checkpointed_iteration.txt"
# What names the checkpoint of a run's best evaluation, where the run keeps one.
BEST_NAME = "best_checkpointed_iteration.txt"
METADATA_NAME = ".metadata"
ASSETS_NAME = "hf"
RANDOM_KEY = "rmipo_random_state"
# Where the common state lies: in a file, or, as Megatron-Core 0.19 writes it, as an object of this key.
COMMON_NAME = "common.pt"
COMMON_KEY = "common_state/shard_0_1"
_ITERATION_NAME = re.compile(r"iter_(\d{7,})")


@dataclasses.dataclass(frozen=True)
class Choice:
    """The checkpoint to go on from.

    Attributes:
        iteration: its step, ``release``, or None where there is none.
        passed_over: why it is not the one that was to be expected, a line each.
    """

    iteration: Iteration | None
    passed_over: tuple[str, ...] = ()


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
            f"config.json and tokenizer files in {assets} (convert_megatron_to_hf.py takes --hf-assets DIR with them, too), or "
            "convert its Hugging Face original with convert_hf_to_megatron.py."
        )
    return assets


def read_metadata(path: Path) -> Metadata:
    """What torch's ``.metadata`` of a checkpoint says: tensors, their shapes and where their pieces lie.

    Raises:
        CheckpointError: it is missing or damaged, or names what no checkpoint may hold.
    """
    try:
        with restricted_unpickling():
            return FileSystemReader(path).read_metadata()
    except Exception as error:
        # A truncated pickle raises whatever its bytes happen to say.
        raise CheckpointError(f"{path / METADATA_NAME} is missing or damaged ({error!r})") from error


def fault_of(path: Path) -> str | None:
    """Why a checkpoint cannot be loaded, or None where it is complete: all files in full size, the assets as they were written.

    Raises:
        NewerCheckpointError: a later version of this package wrote it.
    """
    if not path.is_dir():
        return "it does not exist"
    try:
        record = read_record(path)
        if record is None:
            return f"{RECORD_NAME} is missing" if _is_ours(path) else _size_fault(path, _sizes_by_metadata(path), exact=False)
    except NewerCheckpointError:
        raise
    except CheckpointError as error:
        return str(error)
    if checkpoint_path(path.parent, record.iteration).name != path.name:
        return f"its {RECORD_NAME} is that of iteration {record.iteration}"
    # The assets are small, and read before the ranks are connected, which then check the rest together.
    assets = {name: digest for name, digest in record.digests.items() if name.startswith(f"{ASSETS_NAME}/")}
    return _size_fault(path, record.files, exact=True) or _first_altered(path, assets)


def _size_fault(path: Path, sizes: Mapping[str, int], *, exact: bool) -> str | None:
    for name, size in sizes.items():
        try:
            found = (path / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found < size or (exact and found != size):
            return f"{name} has {found} bytes instead of {size}"
    return None


def _first_altered(path: Path, digests: Mapping[str, str]) -> str | None:
    for name, digest in digests.items():
        try:
            if file_digest(path / name) != digest:
                return f"{name} does not hold what was written"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return None


def choose_checkpoint(directory: Path, before: Iteration | None = None) -> Choice:
    """The checkpoint to go on from: the one the tracker file names if it is complete, else the newest complete one before it.

    A later one than the tracker names is of a branch that was left, and is not taken. Where the tracker file says nothing, the
    newest complete one is taken; ``release``, where there is no iteration or the tracker file names it.

    Args:
        directory: holds ``iter_*`` or ``release`` and the tracker file.
        before: take only one from before this iteration, whatever the tracker file says.

    Raises:
        NewerCheckpointError: a later version of this package wrote the one to go on from.
    """
    directory = Path(directory)
    tracked: Iteration | None = read_tracker(directory) if before is None else before
    steps, said = sorted(iterations_of(directory), reverse=True), []
    candidates: list[Iteration] = [*steps]
    if tracked == "release":
        candidates = []
    elif tracked is not None:
        if before is None and steps and tracked not in steps:
            said.append(f"{directory / TRACKER_NAME} names {tracked}, which is not there")
        candidates = [step for step in steps if step < tracked or (before is None and step == tracked)]
    elif steps:
        said.append(f"{directory / TRACKER_NAME} is missing or says nothing, so the newest complete checkpoint is looked for")
    if (directory / "release").is_dir() and before is None and (not steps or tracked == "release"):
        candidates.append("release")
    for iteration in candidates:
        fault = fault_of(checkpoint_path(directory, iteration))
        if fault is None:
            return Choice(iteration, tuple(said))
        said.append(f"{checkpoint_path(directory, iteration)} is passed over: {fault}")
    return Choice(None, tuple(said))


def latest_complete_iteration(directory: Path) -> Iteration | None:
    """The checkpoint of :func:`choose_checkpoint`, or None where there is none."""
    return choose_checkpoint(directory).iteration


def find_checkpoint(directory: Path, iteration: AskedIteration | None = None) -> tuple[Path, Iteration]:
    """A complete checkpoint: the one asked for, that of the best evaluation, or the latest.

    Raises:
        CheckpointError: saying what is there and what is wrong with it.
    """
    directory = Path(directory)
    if iteration is None:
        iteration = latest_complete_iteration(directory)
        if iteration is not None:
            return checkpoint_path(directory, iteration), iteration
        raise CheckpointError(nothing_complete(directory))
    if iteration == "best":
        iteration = best_iteration(directory)
    path = checkpoint_path(directory, iteration)
    if fault := fault_of(path):
        there = [str(i) for i in sorted(iterations_of(directory))] + (["release"] if (directory / "release").is_dir() else [])
        raise CheckpointError(f"{path} cannot be loaded: {fault}. In {directory} there are: {', '.join(there) or 'none'}.")
    return path, iteration


def iterations_of(directory: Path) -> Iterator[int]:
    """Steps of the checkpoints that are there, whole or damaged; not of those set aside or being written."""
    for path in Path(directory).glob("iter_*"):
        if (match := _ITERATION_NAME.fullmatch(path.name)) and path.is_dir():
            yield int(match[1])


def best_iteration(directory: Path) -> int:
    """The checkpoint of the best evaluation of a run that keeps one.

    Raises:
        CheckpointError: none is kept there.
    """
    best = read_tracker(directory, BEST_NAME)
    if best is None or best == "release":
        raise CheckpointError(
            f"{directory / BEST_NAME} is missing or says nothing: no run with --keep-best has kept a checkpoint there. Name a "
            "step, or leave --iteration out for the latest."
        )
    return best


def read_tracker(directory: Path, name: str = TRACKER_NAME) -> Iteration | None:
    """What the tracker file names, or None where it is missing or says nothing that could be a checkpoint."""
    try:
        text = (directory / name).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    if text == "release":
        return "release"
    return int(text) if text.isascii() and text.isdigit() else None


def nothing_complete(directory: Path) -> str:
    """Why :func:`choose_checkpoint` finds none, for a message."""
    if not directory.is_dir():
        return f"{directory} does not exist. Name a directory of checkpoints (with {TRACKER_NAME})."
    if (directory / "metadata.json").exists():
        return f"{directory} is one checkpoint, not a directory of them. Name its parent, {directory.parent}."
    candidates: list[Iteration] = sorted(iterations_of(directory), reverse=True)
    if (directory / "release").is_dir():
        candidates.append("release")
    faults = {i: fault_of(checkpoint_path(directory, i)) for i in candidates[:5]}
    lines = [f"  {checkpoint_path(directory, i).name}: {fault}" for i, fault in faults.items() if fault is not None]
    lines += [
        f"  {path.name}: was being written when its run ended" for path in sorted(directory.glob("*" + INCOMPLETE_SUFFIX))[:5]
    ]
    whole = [str(i) for i, fault in faults.items() if fault is None]
    if whole:
        lines.append(f"{', '.join(whole)} can be loaded: to take one, write its name into {directory / TRACKER_NAME}.")
    if not lines:
        return f"{directory} holds no checkpoint (no iter_* and no release folder)."
    return f"{directory} holds no complete checkpoint to go on from:\n" + "\n".join(lines)


def _is_ours(path: Path) -> bool:
    """Whether a checkpoint without a record was written by this package all the same, by what lies in and around it."""
    # Looked for as bytes: the file may be damaged, too. Its hf folder tells nothing: one is put into foreign checkpoints by hand.
    try:
        if RANDOM_KEY.encode() in (path / METADATA_NAME).read_bytes():
            return True
    except OSError:
        pass
    return any((sibling / RECORD_NAME).is_file() for sibling in path.parent.glob("iter_*"))


def _sizes_by_metadata(path: Path) -> Mapping[str, int]:
    """Least sizes of the files of a checkpoint of another program, by what torch's metadata says lies in them."""
    sizes = dict.fromkeys(("metadata.json", METADATA_NAME), 1)
    if not (path / METADATA_NAME).is_file():
        return sizes
    metadata = read_metadata(path)
    if COMMON_KEY not in metadata.state_dict_metadata:
        sizes[COMMON_NAME] = 1
    for item in metadata.storage_data.values():
        sizes[item.relative_path] = max(sizes.get(item.relative_path, 0), item.offset + item.length)
    return sizes
