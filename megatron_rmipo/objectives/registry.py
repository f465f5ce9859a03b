"""Which objectives exist, what their options are, and how one is built from a name and options."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping

from megatron_rmipo.objectives.alpha_dpo import AlphaDpo
from megatron_rmipo.objectives.alpha_po import AlphaPo
from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.objectives.beta_dpo import BetaDpo
from megatron_rmipo.objectives.cpo import Cpo
from megatron_rmipo.objectives.dpo import Dpo
from megatron_rmipo.objectives.epsilon_dpo import EpsilonDpo
from megatron_rmipo.objectives.hinge import Hinge
from megatron_rmipo.objectives.infopo import Infopo
from megatron_rmipo.objectives.ipo import Ipo
from megatron_rmipo.objectives.kto import Kto
from megatron_rmipo.objectives.orpo import Orpo
from megatron_rmipo.objectives.rmipo import Rmipo
from megatron_rmipo.objectives.sft import Sft
from megatron_rmipo.objectives.simper import Simper
from megatron_rmipo.objectives.simpo import Simpo
from megatron_rmipo.objectives.slic import Slic

_CLASSES: tuple[type[Objective], ...] = (
    Rmipo,
    Simpo,
    Simper,
    Dpo,
    Ipo,
    Slic,
    Hinge,
    Cpo,
    Kto,
    AlphaDpo,
    BetaDpo,
    EpsilonDpo,
    Infopo,
    Orpo,
    AlphaPo,
    Sft,
)
OBJECTIVES: dict[str, type[Objective]] = {objective.name: objective for objective in _CLASSES}


def find_objective(name: str) -> type[Objective]:
    """The class of an objective: a name in :data:`OBJECTIVES`, or ``package.module:Class`` for one of your own.

    Raises:
        ValueError: the name is unknown (naming the nearest), or the class cannot be imported or is not an :class:`Objective`.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, OBJECTIVES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown objective {name!r}{hint} Known: {', '.join(OBJECTIVES)}, or package.module:Class")
    module_name, _, class_name = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"objective {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise ValueError(f"objective {name!r} is not a subclass of megatron_rmipo.objectives.base.Objective")
    return found


def build_objective(name: str, options: Mapping[str, object]) -> Objective:
    """Build an objective; an option that is None counts as not given.

    Args:
        name: a name in :data:`OBJECTIVES`, or ``package.module:Class``.
        options: option name -> value, only such as the objective has.

    Raises:
        ValueError: the objective is unknown, does not have an option (naming those it has and who has this one), or an option's
            value is not valid.
    """
    objective = find_objective(name)
    given = {key: value for key, value in options.items() if value is not None}
    valid = _option_names(objective)
    for key in given:
        if key not in valid:
            raise ValueError(_unused_option(name, key, given[key], valid))
    return objective(objective.Config(**given))


def _option_names(objective: type[Objective]) -> list[str]:
    return [field.name for field in dataclasses.fields(objective.Config)]


def _unused_option(name: str, key: str, value: object, valid: list[str]) -> str:
    takers = [other for other, objective in OBJECTIVES.items() if key in _option_names(objective)]
    message = f"objective {name!r} does not use {key} (set to {value!r})"
    if takers:
        message += f"; {', '.join(takers)} would"
    else:
        near = difflib.get_close_matches(key, valid, n=1)
        message += f"; did you mean {near[0]}?" if near else ""
    return f"{message}. It has {', '.join(valid) if valid else 'no options'}"
