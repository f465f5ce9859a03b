"""What a run leaves: checkpoints while it trains, a Hugging Face model at its end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_rmipo.checkpoint.adapter_source import save_adapter
from megatron_rmipo.checkpoint.hf.for_inference import NOTHING_ELSE, Beside
from megatron_rmipo.checkpoint.megatron.commit import prune_checkpoints, write_best
from megatron_rmipo.checkpoint.megatron.directory import best_iteration, checkpoint_path, iterations_of
from megatron_rmipo.checkpoint.megatron.loading import load_checkpoint
from megatron_rmipo.checkpoint.megatron.owner import DirectoryOwner
from megatron_rmipo.checkpoint.megatron.store import CheckpointSaver
from megatron_rmipo.checkpoint.peft.forms import form_of_plan
from megatron_rmipo.checkpoint.source import ModelSource, checkpoint_to_go_on_from, holds_checkpoints, saved_flags
from megatron_rmipo.checkpoint.whole_directories import check_output_directory
from megatron_rmipo.config.schema import Config
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.model.lora.merging import merge_adapter
from megatron_rmipo.model.lora.switch import is_adapted
from megatron_rmipo.publishing.model_card import model_card
from megatron_rmipo.reports.reporter import BEST_FILE, METRICS_FILE
from megatron_rmipo.reports.summary import read_records
from megatron_rmipo.runtime.agreement import on_first_rank
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.runtime.signals import RunStopped, StopRequest
from megatron_rmipo.training.course.selection import Watch
from megatron_rmipo.training.plan import RunPlan
from megatron_rmipo.training.progress import Progress
from megatron_rmipo.training.setup import TrainingState
from megatron_rmipo.whole_files import replace_file


def check_outputs(config: Config, source: ModelSource) -> None:
    """Refuse output directories in which something would be lost.

    Raises:
        ConfigError: ``--save`` is a file, or holds checkpoints of a run that this one does not go on with, or of another program.
        ConversionError: ``--save-hf`` or ``--save-adapter`` holds something.
    """
    if config.checkpoint.save_hf is not None:
        check_output_directory(Path(config.checkpoint.save_hf), "--save-hf")
    if config.lora.save_adapter is not None:
        check_output_directory(Path(config.lora.save_adapter), "--save-adapter")
    if config.checkpoint.save is None:
        return
    save = Path(config.checkpoint.save)
    if save.exists() and not save.is_dir():
        raise ConfigError(f"--save {save} is a file. Name a directory.")
    goes_on = config.checkpoint.load is not None and Path(config.checkpoint.load).resolve() == save.resolve()
    if holds_checkpoints(save) and not (goes_on and not config.checkpoint.finetune):
        raise ConfigError(
            f"--save {save} holds checkpoints of another run. Go on with that run with --load {save} (without --finetune), or "
            "name another directory."
        )
    if goes_on and source.is_foreign:
        raise ConfigError(
            f"--load {save}: {source.checkpoint_path.name} was written by another program; how far that had come is not known. "
            f"Start a new run from its weights with --finetune, and with another directory for --save than {save}, where the "
            "checkpoints of both would mix."
        )


def own_save_directory(config: Config, groups: ProcessGroups) -> DirectoryOwner | None:
    """Make sure that no other run saves where this one does. All ranks call it together.

    Returns:
        On the first rank the right to write there, if ``--save`` is given; None elsewhere.

    Raises:
        CheckpointError: on every rank: another run has it.
        ConfigError: on every rank: it cannot be written.
    """
    owners: list[DirectoryOwner] = []

    def own() -> None:
        if config.checkpoint.save is None:
            return
        try:
            owners.append(DirectoryOwner(Path(config.checkpoint.save)))
        except OSError as error:
            raise ConfigError(f"--save {config.checkpoint.save} cannot be written: {error}. Name another directory.") from error

    on_first_rank(groups.world, own)
    return owners[0] if owners else None


class RunCheckpoints:
    """The checkpoints of a run, where ``--save`` names a place. All ranks call each method together.

    Within its block; what is still being written when that is left by an error is given up, and those before stay.

    Args:
        config: the run's configuration.
        source: the model that it starts from.
        state: what is saved.
        progress: of the run, as it is when it is saved.
        groups: the process groups of this rank.
        owner: on the first rank, the right to write there.
        beside: on the first rank: what belongs to the model as it is besides its weights.
        adapter: what the adapter is that is trained; None where the whole model is.
    """

    def __init__(
        self,
        config: Config,
        source: ModelSource,
        state: TrainingState,
        progress: Progress,
        groups: ProcessGroups,
        owner: DirectoryOwner | None,
        beside: Callable[[], Beside],
        adapter: dict[str, Any] | None = None,
    ) -> None:
        self._adapter = adapter
        self._config, self._source, self._state, self._progress, self._owner = config, source, state, progress, owner
        self._groups, self._beside, self._saved_step = groups, beside, progress.step
        self._saver = CheckpointSaver(groups, in_background=config.checkpoint.async_save)

    def __enter__(self) -> RunCheckpoints:
        self._saver.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._saver.__exit__(kind, error, trace)

    @property
    def saved_step(self) -> int:
        """The step of the last :meth:`save`; that at which the run starts, before any."""
        return self._saved_step

    def save(self) -> None:
        """Write a checkpoint of the run as it is; with ``--async-save`` begin to, once the one before is there.

        Raises:
            CheckpointError: as :meth:`megatron_rmipo.checkpoint.megatron.store.CheckpointSaver.save`.
        """
        flags = self._config.checkpoint
        self._saved_step = self._progress.step
        if flags.save is None:
            return
        self._state.gather_parameters()
        with_optimizer = not flags.no_save_optim
        self._saver.save(
            Path(flags.save),
            self._progress.step,
            model=self._state.model,
            optimizer=self._state.optimizer if with_optimizer else None,
            scheduler=self._state.scheduler if with_optimizer else None,
            train_state={**dataclasses.asdict(self._progress), "objective_state": dict(self._state.objective_state)},
            config=self._config.to_flat_dict(),
            assets_dir=self._source.assets,
            keep_last=flags.keep_last,
            owner=self._owner,
            beside=self._beside() if self._groups.rank == 0 else NOTHING_ELSE,
            adapter=self._adapter,
        )

    def keep_best(self, best: Watch) -> bool:
        """Make sure that the checkpoint of the best evaluation is there, written down as such and not pruned.

        What is being written is waited for first: the best counts once it is whole.

        Args:
            best: which it is; before any, what an earlier run has written down there is forgotten.

        Returns:
            False where it is not there, and no more made: it is of a step before this one.

        Raises:
            CheckpointError: as :meth:`save`.
        """
        assert self._config.checkpoint.save is not None
        directory = Path(self._config.checkpoint.save)
        self.wait()
        is_there = best.step == 0 or on_first_rank(self._groups.world, checkpoint_path(directory, best.step).is_dir)
        if not is_there and best.step == self._progress.step:
            self.save()
            self.wait()
        elif not is_there:
            best = Watch(best.metric)
        on_first_rank(self._groups.world, lambda: self._write_best(directory, best))
        return is_there or best.step > 0

    def _write_best(self, directory: Path, best: Watch) -> None:
        """On the first rank: write down which checkpoint is the best, in ``--save`` and in the log directory."""
        if self._owner is not None:
            self._owner.check()
        record = self._config.log_directory / BEST_FILE
        write_best(directory, best.step or None)
        if not best.step:
            record.unlink(missing_ok=True)
            return
        path = checkpoint_path(directory, best.step)
        found = {"metric": best.metric, "step": best.step, "value": best.value, "checkpoint": str(path)}
        replace_file(record, [json.dumps(found) + "\n"])
        if (keep_last := self._config.checkpoint.keep_last) is not None:
            prune_checkpoints(directory, keep_last, max(iterations_of(directory)), in_use=self._source.assets)

    def load_best(self) -> int:
        """Load the weights of the best evaluation's checkpoint into the model, whose training is over; its step.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        assert self._config.checkpoint.save is not None
        directory = Path(self._config.checkpoint.save)
        step: int = on_first_rank(self._groups.world, lambda: best_iteration(directory))
        if step != self._progress.step:
            load_checkpoint(
                directory,
                model=self._state.model,
                optimizer=None,
                scheduler=None,
                load_rng=False,
                groups=self._groups,
                iteration=step,
                verify=not self._config.checkpoint.no_verify_checkpoint,
            )
        return step

    def look_after(self) -> None:
        """Make the checkpoint that is being written the latest if it is whole by now.

        Raises:
            CheckpointError: a rank could not write its share.
        """
        self._saver.finish_if_written()

    def wait(self) -> None:
        """As :meth:`look_after`, once it is whole."""
        self._saver.wait()


def save_trained_adapter(
    config: Config, source: ModelSource, state: TrainingState, groups: ProcessGroups, card: Callable[[], str | None]
) -> None:
    """Write the trained adapter as PEFT has it, where ``--save-adapter`` names a directory. All ranks call it together.

    Args:
        config: the run's.
        source: the adapted model.
        state: that trained it.
        groups: the process groups of this rank.
        card: on the first rank: the text of its model card.

    Raises:
        ConversionError: it cannot be written.
    """
    if config.lora.save_adapter is None:
        return
    assert source.adapters is not None
    state.gather_parameters()
    save_adapter(state.policy, source.adapters, source.arch, _base_of(source), Path(config.lora.save_adapter), groups, card)


def _base_of(source: ModelSource) -> Path:
    """The directory of the frozen model that an adapter's config names."""
    assert source.base is not None
    # As checkpoints have it, from which the same adapter can be written.
    return (source.base.assets if source.base.hf_weights is None else source.base.hf_weights).resolve()


def save_hf(
    config: Config,
    source: ModelSource,
    state: TrainingState,
    progress: Progress,
    groups: ProcessGroups,
    stop: StopRequest,
    beside: Callable[[], Beside],
) -> None:
    """Write the trained model as a Hugging Face directory, where ``--save-hf`` names one. All ranks call it together.

    An adapter is merged into it; the model is not computed with after that.

    Raises:
        ConversionError: it cannot be written.
        RunStopped: a signal came, and the run has a checkpoint to export from; without one the export goes on to its end.
    """
    if config.checkpoint.save_hf is None:
        return
    state.gather_parameters()
    if is_adapted(state.policy):
        merge_adapter(state.policy)
    stopped = False
    with stop:
        try:
            is_kept = config.checkpoint.save is not None
            source.maker.export(
                state.policy,
                source.arch,
                source.assets,
                Path(config.checkpoint.save_hf),
                dtype=config.checkpoint.save_hf_dtype,
                groups=groups,
                stop=stop if is_kept else None,
                beside=beside() if groups.rank == 0 else NOTHING_ELSE,
            )
        except RunStopped:
            stopped = True

        def end() -> str:
            name = config.checkpoint.save_hf
            return f"before the export to {name} was complete. {where_it_stands(config, progress)}" if stopped else ""

        text = on_first_rank(groups.world, end)
    if text:
        raise RunStopped(text)


def beside_weights(plan: RunPlan, groups: ProcessGroups, step: int | None = None) -> Beside:
    """What belongs to the model of a run; a matter of the first rank, which reads metrics.jsonl for it.

    Args:
        plan: the run.
        groups: the process groups of this rank.
        step: after which the weights are those of the model; None: as it is now.
    """
    return Beside(plan.data.chat.form, card_of_run(plan, groups, step))


def card_of_run(plan: RunPlan, groups: ProcessGroups, step: int | None = None, *, of_adapter: bool = False) -> str:
    """The card of a run's model, or of its adapter; as :func:`beside_weights`."""
    config, progress, source = plan.config, plan.start.progress, plan.source
    step = progress.step if step is None else step
    metrics = config.log_directory / METRICS_FILE
    records = [record for record in read_records(metrics) if record["step"] <= step] if metrics.is_file() else []
    adapters = source.adapters
    return model_card(
        config,
        Path(config.model.load_hf or saved_flags(source).get("load_hf") or source.directory),
        plan.data.manifests,
        records,
        step=step,
        consumed_pairs=next((one["consumed_pairs"] for one in reversed(records) if one["step"] == step), progress.consumed_pairs),
        layout=f"TP {groups.tp_size} x PP {groups.pp_size} x CP {groups.cp_size} x DP {groups.dp_size}",
        adapter=None if adapters is None else form_of_plan(adapters.plan, source.arch, str(_base_of(source))).to_config(),
        is_merged=not of_adapter,
    )


def where_it_stands(config: Config, progress: Progress) -> str:
    """What is kept of a run that stops, and how it goes on. It looks at the disk: a matter of one rank."""
    if progress.step == 0:
        return "No step was taken yet; start again."
    kept = checkpoint_to_go_on_from(config.checkpoint)
    without = " and without --finetune." if config.checkpoint.finetune else "."
    if kept is not None and kept == checkpoint_path(kept.parent, progress.step):
        return f"Step {progress.step} is saved; go on with --load {kept.parent}{without}"
    return f"Step {progress.step} is lost: --save names no directory."
