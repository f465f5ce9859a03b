"""The files of a Hugging Face directory, written by the ranks that hold their tensors, all at the same time."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from megatron_rmipo.checkpoint.hf.gathering import GatheredTensors, Seat
from megatron_rmipo.checkpoint.hf.output_files import FileWriter
from megatron_rmipo.checkpoint.hf.writer import MegatronTensor, ModelFile, Part, write_part
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.runtime.shared_work import Halt, SharedWork


@dataclasses.dataclass(frozen=True)
class FileShare:
    """A file of this rank's stage that it helps to write.

    Attributes:
        file: the file.
        writer: who writes it.
        turn: which of that rank's files it is.
    """

    file: ModelFile
    writer: Seat
    turn: int


def share_files(files: Sequence[ModelFile], stage: int, num_replicas: int, tp_size: int) -> list[FileShare]:
    """Who writes the files of a stage: each another rank, of all model replicas before a second one of any."""
    shares = []
    for number, file in enumerate(file for file in files if file.plan.stage == stage):
        turn, seat = divmod(number, num_replicas * tp_size)
        shares.append(FileShare(file, Seat(seat % num_replicas, seat // num_replicas), turn))
    return shares


def steps_of(shares: Sequence[FileShare]) -> Iterator[tuple[FileShare, Part, bool]]:
    """The parts of files in the order in which ranks put them together, and whether each is its file's last.

    Files of the same turn go side by side, a part of each after another. Each rank goes through those that it helps with, all in
    this one order, so that no two wait for each other.
    """
    for turn in sorted({share.turn for share in shares}):
        side_by_side = [share for share in shares if share.turn == turn]
        for number in range(max(len(share.file.parts) for share in side_by_side)):
            for share in side_by_side:
                parts = share.file.parts
                if number < len(parts):
                    yield share, parts[number], number == len(parts) - 1


class ShareWriter:
    """Writes this rank's files, and sends others what it holds of theirs.

    Args:
        directory: where the files go.
        arch: the model.
        tensors: the model's.
        work: is told how far it is, and why it does not go on.
    """

    def __init__(
        self,
        directory: Path,
        arch: ModelArchitecture,
        tensors: GatheredTensors,
        work: SharedWork,
    ) -> None:
        self._directory, self._arch, self._tensors, self._work = directory, arch, tensors, work
        self._writer: FileWriter | None = None

    def write(self, shares: Sequence[FileShare]) -> None:
        """Go through the files of this rank's stage. What fails here halts the work and is not raised."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            for share, part, is_last in steps_of([share for share in shares if self._tensors.helps(share.writer)]):
                # The others send and receive the next tensor, so it is carried to its end even where nothing is written.
                whole, goes_on = self._tensors.gather(part.rule, part.place, share.writer), self._work.goes_on()
                if whole is not None and goes_on:
                    self._take(share, part, whole, is_last)

    def _take(self, share: FileShare, part: Part, whole: Tensor, is_last: bool) -> None:
        try:
            if self._writer is None:
                self._writer = FileWriter(self._directory, share.file.plan)
            tensor = MegatronTensor(part.rule, part.place, whole.dtype, lambda start, stop: whole[start:stop])
            self._work.add(write_part(self._writer, part, tensor, self._arch))
            if is_last:
                self._writer.finish()
                self._close()
        except OSError as error:
            self._work.halt(Halt("failed", str(error)))

    def _close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):  # what a full disk has not taken
                self._writer.close()
            self._writer = None
