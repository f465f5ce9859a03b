"""A training run's arguments: the trainer's flags together with the options of every objective."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rmipo.config.parsing import parse_config
from megatron_rmipo.config.schema import Config
from megatron_rmipo.objectives.registry import OBJECTIVES, find_objective


def parse_arguments(argv: Sequence[str]) -> Config:
    """Read flags and the YAML file of ``--config``.

    Args:
        argv: the arguments, without the program's name.

    Raises:
        ConfigError: see :func:`megatron_rmipo.config.parsing.parse_config`.
        SystemExit: after ``--help``.
    """
    options = {name: objective.Config for name, objective in OBJECTIVES.items()}
    return parse_config(argv, options, load_options=lambda name: find_objective(name).Config)
