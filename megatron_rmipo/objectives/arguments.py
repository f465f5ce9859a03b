"""A training run's arguments: the trainer's flags together with the options of every objective, and the objective they name."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rmipo.config.parsing import parse_config
from megatron_rmipo.config.schema import Config
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
    options = {name: objective.Config for name, objective in OBJECTIVES.items()}
    return parse_config(
        argv,
        options,
        load_options=lambda name: find_objective(name).Config,
        defaults_of=lambda name: {"lr": find_objective(name).default_lr},
    )


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
