"""What torchrun told this process of its place among the ranks: the one reader of ``RANK``, ``WORLD_SIZE`` and their like."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from megatron_rmipo.errors import ConfigError

# Each of these says that the process is one of several. A MASTER_ADDR alone does not: people export it for launchers.
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_NEEDED = (*_PLACE, "MASTER_ADDR", "MASTER_PORT")
_OPTIONAL = ("LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
# A directory in which each rank of a host leaves how it ended, by its number there; made by megatron_rmipo.launch.
ENDS_VARIABLE = "MEGATRON_RMIPO_ENDS"


@dataclasses.dataclass(frozen=True)
class Launch:
    """The place of a process among the ranks.

    Attributes:
        rank: its number among all, from 0.
        world_size: number of all.
        local_rank: its number among those of this host, from 0.
        local_world_size: number of those of this host.
        address: ``HOST:PORT`` where the first rank is met, "" for a process alone.
        restarts: how often torchrun has started the ranks anew (``--max-restarts``), after one of them failed.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = ""
    restarts: int = 0


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """The place torchrun gave this process; a process that nobody launched is alone.

    Raises:
        ConfigError: the environment is incomplete, or holds something else than such numbers.
    """
    values = {name: environment.get(name, "").strip() for name in (*_NEEDED, *_OPTIONAL)}
    given = [name for name in _PLACE if values[name]]
    if not given:
        return Launch()
    missing = [name for name in _NEEDED if not values[name]]
    if missing:
        found = " and ".join(f"{name}={values[name]}" for name in given)
        raise ConfigError(
            f"the environment has {found}, as for one of several ranks, but not {', '.join(missing)}. Start the ranks with "
            f"torchrun (torchrun --nproc-per-node N ...), which sets all of them, or run alone: unset {' '.join(given)}."
        )
    world_size = _number("WORLD_SIZE", values, 1)
    rank = _number("RANK", values, 0, world_size - 1)
    local_world_size = _number("LOCAL_WORLD_SIZE", values, 1) if values["LOCAL_WORLD_SIZE"] else 1
    address = f"{values['MASTER_ADDR']}:{_number('MASTER_PORT', values, 1, 65535)}"
    restarts = _number("TORCHELASTIC_RESTART_COUNT", values, 0) if values["TORCHELASTIC_RESTART_COUNT"] else 0
    return Launch(rank, world_size, _number("LOCAL_RANK", values, 0), local_world_size, address, restarts)


def launch_for_messages() -> Launch:
    """The same for a message, which must not die of an environment that is itself an error to tell."""
    try:
        return read_launch()
    except ConfigError:
        return Launch()


def _number(name: str, values: Mapping[str, str], least: int, most: int | None = None) -> int:
    text = values[name]
    number = int(text) if text.isascii() and text.isdigit() else -1
    if number < least or (most is not None and number > most):
        wanted = f"a number from {least}" + ("" if most is None else f" to {most}")
        raise ConfigError(
            f"the environment has {name}={text}, which is not {wanted}. Start the ranks with torchrun, which sets it, or run "
            f"alone: unset {' '.join(_PLACE)}."
        )
    return number
