"""Whether a run goes on from a checkpoint of its own, and whether it is still the same run."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_rmipo.checkpoint.megatron.directory import checkpoint_path, iterations_of
from megatron_rmipo.checkpoint.source import Look, ModelSource, look_alone, saved_flags, saved_train_state
from megatron_rmipo.config.schema import Config, DataConfig, ObjectiveConfig
from megatron_rmipo.config.unknown_flags import flag_of
from megatron_rmipo.data.batches.order_names import NEW_ORDER, check_order
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.base import Objective, State
from megatron_rmipo.training.data import RunData
from megatron_rmipo.training.progress import Progress

# What a resumed run must not change -> how it is told.
_FIXED = {
    "global_batch_size": "--global-batch-size",
    "seed": "--seed",
    "num_pairs": "number of training pairs",
    "objective": "--objective",
}


@dataclasses.dataclass(frozen=True)
class StartingPoint:
    """Where a run starts.

    Attributes:
        progress: of the run, nothing done yet in a new one.
        objective_state: what the objective carries into the first step.
        resumes: whether the run goes on from a checkpoint of its own.
        warning: what it may change, and has, "" for nothing.
    """

    progress: Progress
    objective_state: State
    resumes: bool
    warning: str = ""


def after_restarts(config: Config, restarts: int, launched: float, *, look: Look = look_alone) -> Config:
    """The configuration of a run whose ranks torchrun has started anew: it goes on from what it has saved.

    The command line is still that of the first start, which began elsewhere. What lies in ``--save`` is the run's own where
    it was saved since torchrun began; a start that was refused for another run's is started anew, too, and is refused again.

    Args:
        config: as the command line says.
        restarts: how often the ranks were started anew.
        launched: when that which starts them began, seconds since 1970.
        look: who looks at the directory.
    """
    flags = config.checkpoint
    if not restarts or flags.save is None:
        return config
    if flags.load is not None and not flags.finetune and Path(flags.load).resolve() == Path(flags.save).resolve():
        return config
    if not look("checkpoints of the run that was started anew", partial(_has_saved_since, Path(flags.save), launched)):
        return config
    goes_on = dataclasses.replace(flags, load=flags.save, finetune=False, no_load_optim=False, no_load_rng=False)
    return dataclasses.replace(config, checkpoint=goes_on)


def _has_saved_since(directory: Path, moment: float) -> bool:
    return any(checkpoint_path(directory, number).stat().st_mtime >= moment for number in iterations_of(directory))


def starting_point(
    config: Config, source: ModelSource, data: RunData, objective: Objective, *, look: Look = look_alone
) -> StartingPoint:
    """The progress saved with the checkpoint the run goes on from, or that of a new run.

    Args:
        config: the run's configuration.
        source: the model that it starts from.
        data: its pairs.
        objective: what is minimized.
        look: who reads what the pairs are, by content, and what the checkpoint says of its run.

    Raises:
        ConfigError: this would not be the same run: the pairs, their order, the objective or its options have changed; or this
            version does not know its order.
    """
    held_out = look("content of the held-out pairs", lambda: data.held_out_fingerprints)
    now = Progress(
        global_batch_size=config.training.global_batch_size,
        seed=config.training.seed,
        num_pairs=len(data.train),
        objective=config.objective.objective,
        options={**config.objective.options, "pair_weight": config.objective.pair_weight},
        data=look("content of the training pairs", lambda: data.train_fingerprint),
        data_flags=_data_flags(config.data),
        held_out=held_out.get("", ""),
        eval_data={name: fingerprint for name, fingerprint in held_out.items() if name},
        order=NEW_ORDER,
    )
    saved, flags = ({}, {}) if config.checkpoint.finetune else _said_of_its_run(source, look)
    if not saved:
        return StartingPoint(now, objective.initial_state(), resumes=False)
    # Checkpoints of before these were saved hold neither.
    state = saved.pop("objective_state", {})
    progress = _known_progress(saved, source)
    # Quantized otherwise, frozen weights would be others, and so would what the adapter is trained to change.
    frozen = (flag_of("quantize_base"), flags.get("quantize_base"), config.lora.quantize_base)
    differences = [*_differences(progress, now, objective), frozen]
    changed = [f"{title} was {was}, is {is_now}" for title, was, is_now in differences if was != is_now]
    if changed:
        raise ConfigError(
            f"--load {source.directory}: this would not be the same run, nor the pairs that are left of it: "
            f"{'; '.join(changed)}. Give them as they were, or start a new run from these weights with --finetune."
        )
    warning = " ".join(_other_than_before(progress, now, _other_settings(flags, config)))
    are_now = {name: getattr(now, name) for name in ("data", "data_flags", "held_out", "eval_data")}
    progress = dataclasses.replace(progress, **are_now)
    return StartingPoint(progress, state or objective.initial_state(), resumes=True, warning=warning)


def _other_than_before(progress: Progress, now: Progress, settings: Sequence[str]) -> Iterator[str]:
    """What a run that goes on may have otherwise than before, and has, a sentence each."""
    if settings:
        yield f"The run goes on with other settings of its optimizer ({'; '.join(settings)})."
    if progress.data and progress.held_out != now.held_out:
        yield (
            f"The held-out pairs are not those that the run had before (then {progress.data_flags}, now {now.data_flags}): "
            "its evaluations before and after this start cannot be compared."
        )
    changed = [name for name, pairs in now.eval_data.items() if progress.eval_data.get(name, pairs) != pairs]
    if changed:
        yield (
            f"--eval-data {', '.join(changed)}: not the pairs of that name that the run had before: evaluations of them before "
            "and after this start cannot be compared."
        )


def _said_of_its_run(source: ModelSource, look: Look) -> tuple[dict[str, Any], dict[str, Any]]:
    """Progress and flags of the run that saved the checkpoint, of whose record every file's name is the larger part."""
    name = f"the run of {source.directory} {source.iteration}"
    progress, flags = look(name, lambda: (saved_train_state(source), saved_flags(source)))
    # A look is remembered, and progress changes.
    return copy.deepcopy(progress), copy.deepcopy(flags)


def _known_progress(saved: Mapping[str, Any], source: ModelSource) -> Progress:
    """The progress that a checkpoint holds.

    Raises:
        ConfigError: a later version saved it, and this one does not know what it says of its run.
    """
    unknown = sorted(saved.keys() - {field.name for field in dataclasses.fields(Progress)})
    if unknown:
        raise ConfigError(
            f"--load {source.directory}: it says of its run what this version does not know ({', '.join(unknown)}). Go on with "
            "the version that began the run, or start a new run from these weights with --finetune."
        )
    progress = Progress(**saved)
    try:
        check_order(progress.order)
    except ConfigError as error:
        raise ConfigError(f"--load {source.directory}: {error}") from error
    return progress


def _other_settings(then: Mapping[str, Any], now: Config) -> list[str]:
    """What a run may change, and has: by a flag, or because a default is another than that of the version that saved it."""
    values = {**dataclasses.asdict(now.optimizer), "lora_plus_ratio": now.lora.lora_plus_ratio}
    return [f"{flag_of(name)} was {then[name]}, is {value}" for name, value in values.items() if then.get(name, value) != value]


def _options_as_now(progress: Progress, objective: Objective) -> dict[str, Any]:
    """What a run's options were, with the defaults of those that there were not yet when it was saved; empty if none were saved.

    Raises:
        ConfigError: this version does not take the options of the run.
    """
    then, kind = progress.options, type(objective.config)
    names = [field.name for field in dataclasses.fields(kind)]
    if names and not then:
        return {}
    try:
        filled = kind(**{name: then[name] for name in names if name in then})
    except ValueError as error:
        raise ConfigError(f"the run's options of --objective {progress.objective} are not taken any more: {error}") from error
    return {"pair_weight": ObjectiveConfig.pair_weight, **{name: getattr(filled, name) for name in names}, **then}


def _differences(progress: Progress, now: Progress, objective: Objective) -> list[tuple[str, Any, Any]]:
    compared = [(title, getattr(progress, name), getattr(now, name)) for name, title in _FIXED.items()]
    if progress.data != now.data:
        then, is_now = (f"{one.data_flags} (content {one.data[:8]})" for one in (progress, now))
        compared.append(("training data", progress.data and then, is_now))
    # Versions that did not save the objective or the data left "".
    compared = [difference for difference in compared if difference[1] != ""]
    if progress.objective == now.objective:
        options = _options_as_now(progress, objective)
        names = sorted(options.keys() & now.options.keys())
        compared += [(flag_of(name), options[name], now.options[name]) for name in names]
    return compared


def _data_flags(data: DataConfig) -> str:
    """The flags that name a run's data, as they are given."""
    flags = ["--data-path", *data.data_path]
    flags += ["--split", data.split] if data.split is not None else []
    flags += ["--valid-data-path", *data.valid_data_path] if data.valid_data_path else []
    return " ".join(flags)
