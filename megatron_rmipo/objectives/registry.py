"""Which objectives exist, what their options are, and how one is built from a name and options."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import typing
from collections.abc import Mapping
from typing import Any

from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.objectives.rmipo import Rmipo
from megatron_rmipo.objectives.sft import Sft
from megatron_rmipo.objectives.simpo import Simpo

OBJECTIVES: dict[str, type[Objective]] = {objective.name: objective for objective in (Rmipo, Simpo, Sft)}


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of one or more objectives, as a command line or a YAML file needs it.

    Attributes:
        type: ``float``, ``bool`` or ``str``.
        choices: the valid values of a ``str``, or None.
        defaults: objective name -> default value (None: depends on other options).
        helps: objective name -> one line of help.
    """

    name: str
    type: type
    choices: tuple[str, ...] | None
    defaults: dict[str, Any]
    helps: dict[str, str]


def objective_options(objective: type[Objective]) -> dict[str, Option]:
    """The options of one objective by name, read from its ``Config`` dataclass."""
    hints = typing.get_type_hints(objective.Config)
    options = {}
    for field in dataclasses.fields(objective.Config):
        option_type, choices = _plain_type(hints[field.name])
        options[field.name] = Option(
            field.name, option_type, choices, {objective.name: field.default}, {objective.name: field.metadata["help"]}
        )
    return options


def all_options() -> dict[str, Option]:
    """The options of all objectives in :data:`OBJECTIVES`, those of the same name merged."""
    merged: dict[str, Option] = {}
    for objective in OBJECTIVES.values():
        for name, option in objective_options(objective).items():
            known = merged.setdefault(name, option)
            assert (known.type, known.choices) == (option.type, option.choices), f"objectives disagree on what {name} is"
            known.defaults.update(option.defaults)
            known.helps.update(option.helps)
    return merged


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
    valid = [field.name for field in dataclasses.fields(objective.Config)]
    for key in given:
        if key not in valid:
            raise ValueError(_unused_option(name, key, given[key], valid))
    return objective(objective.Config(**given))


def _unused_option(name: str, key: str, value: object, valid: list[str]) -> str:
    takers = [other for other, objective in OBJECTIVES.items() if key in objective_options(objective)]
    message = f"objective {name!r} does not use {key} (set to {value!r})"
    if takers:
        message += f"; {', '.join(takers)} would"
    else:
        near = difflib.get_close_matches(key, valid, n=1)
        message += f"; did you mean {near[0]}?" if near else ""
    return f"{message}. It has {', '.join(valid) if valid else 'no options'}"


def _plain_type(hint: Any) -> tuple[type, tuple[str, ...] | None]:
    """``float | None -> float``, ``Literal["a", "b"] | None -> str`` and its choices."""
    arguments = [argument for argument in typing.get_args(hint) if argument is not type(None)]
    if type(None) in typing.get_args(hint):
        assert len(arguments) == 1, f"an option of type {hint} has no single flag type"
        return _plain_type(arguments[0])
    if typing.get_origin(hint) is typing.Literal:
        return str, tuple(arguments)
    assert hint in (float, int, bool, str), f"an option of type {hint} cannot be a flag"
    return hint, None
