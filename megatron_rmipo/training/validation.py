"""Impossible configurations, refused before any model is built, each with numbers that would work."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_rmipo.config.flag_problems import config_problems, profiled_steps_problems, refuse
from megatron_rmipo.config.schema import Config, ProfilingConfig
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.model.problems.layout import layout_problems, machine_problems


def validate(config: Config, architecture: ModelArchitecture, world_size: int) -> None:
    """Refuse what cannot work, all faults at once.

    Args:
        config: the run's configuration.
        architecture: the model it is to train.
        world_size: number of ranks torchrun started.

    Raises:
        ConfigError: one line per fault: the flags, their values, and values that would work.
    """
    ranks = _profiled_ranks(config.profiling, world_size)
    # A dry run is for other machines than this one.
    flags = config_problems(config) if config.planning.dry_run else problems_without_model(config)
    refuse([*flags, *layout_problems(config, architecture, world_size), *ranks])


def refuse_profiling_beyond_the_end(config: Config, train_iters: int) -> None:
    """The check of ``--profile-step-end`` for a run whose length only the data tells.

    Args:
        config: the run's configuration, validated.
        train_iters: optimizer steps of the whole run.

    Raises:
        ConfigError: as :func:`validate`.
    """
    refuse(list(profiled_steps_problems(config.profiling, train_iters)))


def problems_without_model(config: Config) -> list[str]:
    """The faults of a configuration that show on this machine without knowing the model or the number of ranks."""
    return [*config_problems(config), *machine_problems(config)]


def _profiled_ranks(profiling: ProfilingConfig, world_size: int) -> Iterator[str]:
    if not profiling.profile:
        return
    unknown = [rank for rank in profiling.ranks if not 0 <= rank < world_size]
    if unknown or not profiling.ranks:
        exist = f"0 to {world_size - 1}" if world_size > 1 else "0"
        yield f"--profile-ranks {' '.join(map(str, profiling.ranks))}: this run has rank{'s' * (world_size > 1)} {exist} alone"
