"""Saving a run: model, optimizer, scheduler and random states in Megatron-Core's ``torch_dist`` format, each rank its share.

Every public function that takes :class:`ProcessGroups` is called by all ranks together, and raises on all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_rmipo.checkpoint.hf.assets import copy_hf_assets
from megatron_rmipo.checkpoint.hf.for_inference import NOTHING_ELSE, Beside
from megatron_rmipo.checkpoint.megatron.commit import (
    abandon_checkpoint,
    begin_checkpoint,
    commit_checkpoint,
    prune_checkpoints,
)
from megatron_rmipo.checkpoint.megatron.common_state import CONTENT
from megatron_rmipo.checkpoint.megatron.directory import ASSETS_NAME, RANDOM_KEY, checkpoint_path
from megatron_rmipo.checkpoint.megatron.megatron_lm_args import common_of_model
from megatron_rmipo.checkpoint.megatron.owner import DirectoryOwner
from megatron_rmipo.checkpoint.megatron.record import CheckpointRecord
from megatron_rmipo.checkpoint.megatron.run_state import (
    CHECKPOINTING_ERRORS,
    arguments_of_run,
    bytes_to_write,
    first_cause,
    layout_of,
    optimizer_kind,
    random_object,
    sharded_state,
)
from megatron_rmipo.checkpoint.shares.background import BackgroundWrite
from megatron_rmipo.checkpoint.shares.hashed_writes import HashedWrites
from megatron_rmipo.checkpoint.shares.random_state import random_state
from megatron_rmipo.checkpoint.shares.strategies import ReplicasInShares, TensorFiles
from megatron_rmipo.checkpoint.whole_directories import check_space
from megatron_rmipo.errors import CheckpointError, DirectoryTakenError, RmipoError
from megatron_rmipo.model.packed_model import Chunks, chunks_of, unwrapped
from megatron_rmipo.runtime.agreement import on_first_rank
from megatron_rmipo.runtime.first_failure import lost_a_rank
from megatron_rmipo.runtime.groups import ProcessGroups, current_device

_SECONDS_BETWEEN_LOOKS = 0.05


def save_checkpoint(directory: Path, iteration: int, *, groups: ProcessGroups, **what: Any) -> Path:
    """Write one checkpoint: :meth:`CheckpointSaver.save`, with its arguments, of a saver for this one, not in the background."""
    return CheckpointSaver(groups).save(directory, iteration, **what)


class CheckpointSaver:
    """Saves a run, one checkpoint after the other. All ranks call each method together.

    Each rank writes its share: the pieces of the optimizer's state that it alone holds, and of what several ranks hold, an
    even part. What lies where is agreed upon by the first saves; later ones, of the same model and optimizer, use that.

    The space is checked first, and a checkpoint is written under another name that is changed when it is whole: whatever goes
    wrong, those written before stay as they are.

    Args:
        groups: the process groups of this rank.
        in_background: :meth:`save` returns when what is to be written is on the host, and a process of each rank writes it. The
            checkpoint is there, and the latest, once :meth:`finish_if_written` or :meth:`wait` says so.
    """

    def __init__(self, groups: ProcessGroups, *, in_background: bool = False) -> None:
        self._groups, self._in_background = groups, in_background
        self._files = TensorFiles("torch_dist", 1, cached_metadata=True)
        self._strategy: Any = self._files if groups.dp_cp.size() == 1 else ReplicasInShares(self._files, groups.dp_cp)
        self._is_structure_known = False
        self._under_way: _Save | None = None

    def save(
        self,
        directory: Path,
        iteration: int,
        *,
        model: Chunks,
        optimizer: Any | None,
        scheduler: Any | None,
        train_state: dict[str, Any],
        config: dict[str, Any],
        assets_dir: Path | None,
        keep_last: int | None = None,
        owner: DirectoryOwner | None = None,
        beside: Beside = NOTHING_ELSE,
        adapter: dict[str, Any] | None = None,
    ) -> Path:
        """Write a checkpoint and make it the latest. What is still being written is waited for first.

        Args:
            directory: the directory of checkpoints, on a file system every rank sees.
            iteration: optimizer steps taken.
            model: this rank's GPTModel, wrapped or not, or its chunks.
            optimizer: Megatron's optimizer, or None to save weights alone.
            scheduler: Megatron's OptimizerParamScheduler, or None.
            train_state: progress of the run, the same on every rank; plain values that JSON holds.
            config: flags of the run by name, plain values.
            assets_dir: directory of the model's Hugging Face config and tokenizer, copied in; None leaves them out.
            keep_last: afterwards remove all but this many of the newest iterations; None keeps all.
            owner: on the first rank, the right to write there; None leaves it to the caller that nobody else does.
            beside: of the first rank: what else belongs to the model, put beside ``assets_dir``.
            adapter: of an adapted model, whose adapter alone is written: what it is; plain values.

        Returns:
            The checkpoint's path.

        Raises:
            CheckpointError: there is no space, the file system refuses, or another run has taken the directory over.
        """
        self.wait()
        directory, groups = Path(directory), self._groups
        state = sharded_state(model, optimizer, scheduler, groups, is_loading=False)
        policy = unwrapped(chunks_of(model)[0])
        state |= common_of_model(
            policy.architecture,
            iteration,
            dtype=policy.config.params_dtype,
            tokenizer=None if assets_dir is None else checkpoint_path(directory, iteration).absolute() / ASSETS_NAME,
            run=arguments_of_run(
                config, train_state, groups, num_chunks=len(chunks_of(model)), has_optimizer=optimizer is not None
            ),
        )
        state[RANDOM_KEY] = random_object(groups, random_state())
        record = CheckpointRecord(iteration, train_state, config, layout_of(groups), optimizer_kind(optimizer), adapter=adapter)
        num_bytes = bytes_to_write(state, groups)
        under_way = self._under_way = _Save(directory, record, assets_dir, keep_last, owner, beside)
        with self._telling():
            under_way.partial = on_first_rank(groups.world, lambda: under_way.begin(num_bytes))
            with under_way.writes:
                request = self._request(state, under_way.partial)
                if self._in_background:
                    under_way.background = BackgroundWrite(request, self._groups.world)
                else:
                    request.execute_sync()
        if not self._in_background:
            self._commit(under_way)
        return checkpoint_path(directory, iteration)

    def finish_if_written(self) -> bool:
        """Make what is being written in the background the latest checkpoint if all ranks have written it.

        Returns:
            Whether nothing is being written any more.

        Raises:
            CheckpointError: a rank could not write its share, or as :meth:`save`.
        """
        under_way = self._under_way
        if under_way is None:
            return True
        assert under_way.background is not None
        with self._telling():
            if not under_way.background.finish_if_written():
                return False
        self._commit(under_way)
        return True

    def wait(self) -> None:
        """Make what is being written in the background the latest checkpoint, however long that takes.

        Raises:
            CheckpointError: as :meth:`finish_if_written`.
        """
        # Asked again and again, no collective waits for a slow disk.
        while not self.finish_if_written():
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """A run that fails leaves what it was writing; each rank by itself."""
        self._abandon()

    def _request(self, state: dict[str, Any], path: Path) -> Any:
        """What remains to be done: this rank's share to be written, and then put together with the others'."""
        # From 0.19 on the implementation is to be named.
        named = {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}
        request = dist_checkpointing.save(
            state,
            str(path),
            self._strategy,
            # It would tell every rank the tensors of all, for the first to check what it checks again when it plans the files.
            validate_access_integrity=False,
            async_sharded_save=True,
            content_metadata=dict(CONTENT),
            **named,
        )
        if not self._is_structure_known:
            # Each rank compares its own part with that of the save before; none may leave out what others still gather.
            is_known = torch.tensor(int(self._files.validated_cache_reuse), device=current_device())
            dist.all_reduce(is_known, op=dist.ReduceOp.MIN, group=self._groups.world)
            self._is_structure_known = self._files.validated_cache_reuse = bool(is_known.item())
        return request

    def _commit(self, under_way: _Save) -> None:
        with self._telling():
            under_way.writes.collect()
            digests = _gather(under_way.writes.digests, self._groups)
            on_first_rank(self._groups.world, lambda: under_way.finish(digests))
        self._under_way = None

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Faults of the save under way end it, and are told as such."""
        under_way = self._under_way
        assert under_way is not None
        try:
            yield
        except (*CHECKPOINTING_ERRORS, RmipoError) as error:
            self._abandon()
            if lost_a_rank(error) or isinstance(error, DirectoryTakenError):
                raise
            raise CheckpointError(
                f"--save {under_way.directory}: the checkpoint of step {under_way.record.iteration} was not written: "
                f"{first_cause(under_way.writes.failure or error)}. Earlier checkpoints are untouched. Free some space, or mend "
                "its permissions, and go on from the latest."
            ) from error

    def _abandon(self) -> None:
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.abandon(is_first=self._groups.rank == 0)


@dataclasses.dataclass
class _Save:
    """A checkpoint that is being written.

    Attributes:
        directory, record, assets_dir, keep_last, owner, beside: as :meth:`CheckpointSaver.save` takes them.
        writes: of this rank.
        partial: where it is written; None before that is made.
        background: what writes it, where that is not the rank itself.
    """

    directory: Path
    record: CheckpointRecord
    assets_dir: Path | None
    keep_last: int | None
    owner: DirectoryOwner | None
    beside: Beside
    writes: HashedWrites = dataclasses.field(default_factory=HashedWrites)
    partial: Path | None = None
    background: BackgroundWrite | None = None

    def begin(self, num_bytes: int) -> Path:
        """On the first rank: a folder to write in."""
        if self.owner is not None:
            self.owner.check()
        check_space(self.directory, num_bytes)
        return begin_checkpoint(self.directory, self.record.iteration)

    def finish(self, digests: dict[str, str]) -> None:
        """On the first rank: the checkpoint gets its name, and is the latest."""
        assert self.partial is not None
        iteration = self.record.iteration
        assert isinstance(iteration, int)
        if self.assets_dir is not None:
            copy_hf_assets(Path(self.assets_dir), self.partial / ASSETS_NAME)
            self.beside.write(self.partial / ASSETS_NAME)
        if self.owner is not None:
            self.owner.check()
        commit_checkpoint(self.partial, self.record, digests)
        if self.keep_last is not None:
            prune_checkpoints(self.directory, self.keep_last, iteration, in_use=self.assets_dir)

    def abandon(self, *, is_first: bool) -> None:
        """End this rank's writers; the first removes what was written."""
        if self.background is not None:
            self.background.abandon()
        self.writes.collect()
        if is_first and self.partial is not None:
            abandon_checkpoint(self.partial)


def _gather(digests: dict[str, str], groups: ProcessGroups) -> dict[str, str]:
    """All ranks' digests on the first rank, nothing elsewhere."""
    parts: list[dict[str, str]] | None = [{}] * groups.world_size if groups.rank == 0 else None
    dist.gather_object(digests, parts, group=groups.world, group_dst=0)
    return {name: digest for part in parts or [] for name, digest in part.items()}
