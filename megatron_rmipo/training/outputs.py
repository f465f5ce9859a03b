"""What a run leaves: checkpoints while it trains, a Hugging Face model at its end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_rmipo.checkpoint.megatron.directory import checkpoint_path
from megatron_rmipo.checkpoint.megatron.owner import DirectoryOwner
from megatron_rmipo.checkpoint.megatron.store import save_checkpoint
from megatron_rmipo.checkpoint.source import ModelSource, checkpoint_to_go_on_from, holds_checkpoints
from megatron_rmipo.checkpoint.whole_directories import check_output_directory
from megatron_rmipo.config.schema import Config
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.runtime.agreement import on_first_rank
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.runtime.signals import RunStopped, StopRequest
from megatron_rmipo.training.progress import Progress
from megatron_rmipo.training.setup import TrainingState


def check_outputs(config: Config, source: ModelSource) -> None:
    """Refuse output directories in which something would be lost.

    Raises:
        ConfigError: ``--save`` is a file, or holds checkpoints of a run that this one does not go on with, or of another program.
        ConversionError: ``--save-hf`` holds something.
    """
    if config.checkpoint.save_hf is not None:
        check_output_directory(Path(config.checkpoint.save_hf), "--save-hf")
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


def save_run(
    config: Config,
    source: ModelSource,
    state: TrainingState,
    progress: Progress,
    groups: ProcessGroups,
    owner: DirectoryOwner | None,
) -> None:
    """Write a checkpoint of the run as it is, where ``--save`` names a place. All ranks call it together.

    Raises:
        CheckpointError: as :func:`megatron_rmipo.checkpoint.megatron.store.save_checkpoint`.
    """
    if config.checkpoint.save is None:
        return
    state.gather_parameters()
    with_optimizer = not config.checkpoint.no_save_optim
    save_checkpoint(
        Path(config.checkpoint.save),
        progress.step,
        model=state.model,
        optimizer=state.optimizer if with_optimizer else None,
        scheduler=state.scheduler if with_optimizer else None,
        train_state={**dataclasses.asdict(progress), "objective_state": dict(state.objective_state)},
        config=config.to_flat_dict(),
        assets_dir=source.assets,
        groups=groups,
        keep_last=config.checkpoint.keep_last,
        owner=owner,
    )


def save_hf(
    config: Config, source: ModelSource, state: TrainingState, progress: Progress, groups: ProcessGroups, stop: StopRequest
) -> None:
    """Write the trained model as a Hugging Face directory, where ``--save-hf`` names one. All ranks call it together.

    Raises:
        ConversionError: it cannot be written.
        RunStopped: a signal came, and the run has a checkpoint to export from; without one the export goes on to its end.
    """
    if config.checkpoint.save_hf is None:
        return
    state.gather_parameters()
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
            )
        except RunStopped:
            stopped = True

        def end() -> str:
            name = config.checkpoint.save_hf
            return f"before the export to {name} was complete. {where_it_stands(config, progress)}" if stopped else ""

        text = on_first_rank(groups.world, end)
    if text:
        raise RunStopped(text)


def where_it_stands(config: Config, progress: Progress) -> str:
    """What is kept of a run that stops, and how it goes on. It looks at the disk: a matter of one rank."""
    if progress.step == 0:
        return "No step was taken yet; start again."
    kept = checkpoint_to_go_on_from(config.checkpoint)
    without = " and without --finetune." if config.checkpoint.finetune else "."
    if kept is not None and kept == checkpoint_path(kept.parent, progress.step):
        return f"Step {progress.step} is saved; go on with --load {kept.parent}{without}"
    return f"Step {progress.step} is lost: --save names no directory."
