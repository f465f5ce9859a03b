"""What an objective gives back, checked where it is cheap: a slip in one of your own is told by its name, not by a traceback."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.base import LossOutput, Objective, State

_INTERFACE = "See megatron_rmipo/objectives/base.py."


def check_objective(objective: Objective) -> None:
    """It is one, and not its name or its class.

    Raises:
        ConfigError: naming what it is instead.
    """
    if not isinstance(objective, Objective):
        raise ConfigError(
            f"objective {objective!r}: an Objective is expected, as build_objective(name, options) of "
            f"megatron_rmipo.objectives.registry makes it. {_INTERFACE}"
        )


def check_output(objective: Objective, output: LossOutput, num_pairs: int) -> None:
    """Losses and metrics are tensors of one value per pair, and distributions name metrics.

    Raises:
        ConfigError: naming the objective, the field and its shape.
    """
    for name, values in {"losses": output.losses, **output.metrics}.items():
        shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        if shape != [num_pairs]:
            raise ConfigError(
                f"objective {objective.name}: {name!r} is {shape} for {num_pairs} pairs; a tensor [{num_pairs}], one value per "
                f"pair, is expected. {_INTERFACE}"
            )
    unknown = sorted(set(output.distributions) - set(output.metrics))
    if unknown:
        raise ConfigError(f"objective {objective.name}: distributions names {unknown[0]!r}, which is no metric. {_INTERFACE}")


def check_prepared(objective: Objective, prepared: Mapping[str, Tensor], num_pairs: int) -> None:
    """What ``prepare`` gave are scalars, or one value per pair of the global batch.

    Raises:
        ConfigError: naming the objective, the value and its shape.
    """
    for name, value in prepared.items():
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if shape not in ([], [num_pairs]):
            raise ConfigError(
                f"objective {objective.name}: prepare gave {name!r} as {shape}; a scalar tensor, or [{num_pairs}] for the pairs "
                f"of the batch, is expected. {_INTERFACE}"
            )


def check_state(objective: Objective, state: State) -> None:
    """The state holds plain numbers, so that a checkpoint can.

    Raises:
        ConfigError: naming the objective and the value.
    """
    for name, value in state.items():
        if not (isinstance(value, float | int) and math.isfinite(value)):
            raise ConfigError(
                f"objective {objective.name}: its state holds {name!r} as {value!r}; a finite number is expected "
                f"(of a tensor, tensor.item()). {_INTERFACE}"
            )
