"""A training run's arguments: the trainer's flags together with the options of every objective, and the objective they name."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rmipo.config.parsing import add_objective_flags, parse_config, parse_fields, read_objective_flags
from megatron_rmipo.config.schema import Config, ObjectiveConfig
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.objectives.pair_weight import PairWeighted
from megatron_rmipo.objectives.registry import OBJECTIVES, build_objective, find_objective


def parse_arguments(argv: Sequence[str]) -> Config:
    """Read flags and the YAML file of ``--config``.

    Args:
        argv: the arguments, without the program's name.

    Raises:
        ConfigError: see :func:`megatron_rmipo.config.parsing.parse_config`.
        SystemExit: after ``--help``.
    """
    return parse_config(
        argv,
        _known_options(),
        load_options=_options_of,
        defaults_of=lambda name: {"lr": find_objective(name).default_lr},
    )


def add_objective_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Add the trainer's flags of an objective to another program's parser.

    Args:
        parser: of the other program, with all its flags.
        argv: the command line that it will read.

    Raises:
        ConfigError: see :func:`megatron_rmipo.config.parsing.add_objective_flags`.
    """
    add_objective_flags(parser, argv, _known_options(), _options_of)


def objective_of_arguments(values: Mapping[str, object]) -> Objective:
    """The objective that another program's arguments name, their parser being one of :func:`add_objective_arguments`.

    Args:
        values: name -> value.

    Raises:
        ConfigError: an option of another objective, or one whose value is not taken.
    """
    return objective_of(Config(objective=read_objective_flags(values, _known_options(), _options_of)))


def parse_fields_and_objective(
    argv: Sequence[str], fields: Mapping[type, Sequence[str]], prog: str, description: str
) -> tuple[dict[type, Any], Objective | None]:
    """Read some of a run's flags and, where ``--objective`` names one, an objective with its options.

    Args:
        argv, fields, prog, description: as of :func:`megatron_rmipo.config.parsing.parse_fields`.

    Raises:
        ConfigError, SystemExit: as there.
    """
    sections = parse_fields(argv, fields, prog, description, _known_options(), _options_of)
    named = sections.get(ObjectiveConfig)
    return sections, None if named is None else objective_of(Config(objective=named))


def _known_options() -> dict[str, type]:
    return {name: objective.Config for name, objective in OBJECTIVES.items()}


def _options_of(name: str) -> type:
    return find_objective(name).Config


def objective_of(config: Config) -> Objective:
    """The objective that a run's configuration names, with its options.

    Raises:
        ConfigError: it is not known here, or an option has a value that it does not take.
    """
    try:
        objective = build_objective(config.objective.objective, config.objective.options)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return PairWeighted(objective) if config.objective.pair_weight else objective
