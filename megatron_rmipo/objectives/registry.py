"""Which objectives exist, what their options are, and how one is built from a name and options."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from megatron_rmipo.config.values import field_types
from megatron_rmipo.objectives.alpha_dpo import AlphaDpo
from megatron_rmipo.objectives.alpha_po import AlphaPo
from megatron_rmipo.objectives.amapo import Amapo
from megatron_rmipo.objectives.aot_pair import AotPair
from megatron_rmipo.objectives.apo_down import ApoDown
from megatron_rmipo.objectives.apo_zero import ApoZero
from megatron_rmipo.objectives.base import LogpNeeds, Objective
from megatron_rmipo.objectives.bco_pair import BcoPair
from megatron_rmipo.objectives.beta_dpo import BetaDpo
from megatron_rmipo.objectives.cpo import Cpo
from megatron_rmipo.objectives.dpo import Dpo
from megatron_rmipo.objectives.epsilon_dpo import EpsilonDpo
from megatron_rmipo.objectives.exo_pair import ExoPair
from megatron_rmipo.objectives.gamma_po import GammaPo
from megatron_rmipo.objectives.hinge import Hinge
from megatron_rmipo.objectives.infopo import Infopo
from megatron_rmipo.objectives.ipo import Ipo
from megatron_rmipo.objectives.kto import Kto
from megatron_rmipo.objectives.mixture import mixture_of, split_members
from megatron_rmipo.objectives.nca_pair import NcaPair
from megatron_rmipo.objectives.options import check_number
from megatron_rmipo.objectives.orpo import Orpo
from megatron_rmipo.objectives.rmipo import Rmipo
from megatron_rmipo.objectives.robust import Robust
from megatron_rmipo.objectives.sft import Sft
from megatron_rmipo.objectives.simper import Simper
from megatron_rmipo.objectives.simpo import Simpo
from megatron_rmipo.objectives.slic import Slic
from megatron_rmipo.objectives.sppo_hard import SppoHard

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
    Amapo,
    GammaPo,
    Robust,
    ApoZero,
    ApoDown,
    NcaPair,
    BcoPair,
    ExoPair,
    SppoHard,
    AotPair,
    Sft,
)
OBJECTIVES: dict[str, type[Objective]] = {objective.name: objective for objective in _CLASSES}


def find_objective(name: str) -> type[Objective]:
    """The class of an objective.

    Args:
        name: a name in :data:`OBJECTIVES`, ``package.module:Class`` for one of your own, or several of either with weights:
            ``dpo:0.8,sft:0.2``.

    Raises:
        ValueError: the name is unknown (naming the nearest), the class cannot be imported, or it is no complete objective.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if (members := split_members(name)) is not None:
        return mixture_of(name, [(find_objective(member), weight) for member, weight in members])
    module_name, _, class_name = name.partition(":")
    if ":" not in name:
        raise ValueError(f"unknown objective {name!r}{_nearest(name)} Known: {', '.join(OBJECTIVES)}, or package.module:Class")
    if not module_name or not class_name or module_name.startswith("."):
        raise ValueError(f"objective {name!r} must be named package.module:Class")
    try:
        module = importlib.import_module(module_name)
    # Whatever a module of the user's raises, SyntaxError included, is a fault of the name or of the module, not of this program.
    except Exception as error:
        raise ValueError(
            f"objective {name!r} cannot be imported: {type(error).__name__}: {error} "
            f"(is its directory on PYTHONPATH? python -c 'import {module_name}' tells more)"
        ) from error
    if not hasattr(module, class_name):
        raise ValueError(f"objective {name!r} cannot be imported: module {module_name} has no {class_name}")
    return _checked(name, getattr(module, class_name))


def build_objective(name: str, options: Mapping[str, object]) -> Objective:
    """Build an objective; an option that is None counts as not given.

    Args:
        name: as :func:`find_objective` takes it.
        options: option name -> value.

    Raises:
        ValueError: the objective is unknown, does not have an option, an option's value is not valid, or what it then needs is
            not.
    """
    found = find_objective(name)
    given = {key: value for key, value in options.items() if value is not None}
    known = [field.name for field in dataclasses.fields(found.Config)]
    for key in given:
        if key not in known:
            raise ValueError(f"objective {name!r} has no option {key}; it has {', '.join(known) or 'none'}")
    objective = found(found.Config(**given))
    for part in (*objective.parts, objective):
        _check_needs(name, part)
    return objective


def _nearest(name: str) -> str:
    """What may have been meant by an unknown name, to follow it in a sentence."""
    if "." in name:
        module_name, _, class_name = name.rpartition(".")
        return f"; did you mean '{module_name}:{class_name}', a colon before the class?"
    near = difflib.get_close_matches(name, OBJECTIVES, n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else "."


def _checked(name: str, found: Any) -> type[Objective]:
    """A class from elsewhere, if it has all that an objective has."""
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise ValueError(f"objective {name!r} is not a subclass of megatron_rmipo.objectives.base.Objective")
    if not isinstance(getattr(found, "name", None), str):
        raise ValueError(f"objective {name!r} needs a class attribute name, a text")
    config = getattr(found, "Config", None)
    if not (isinstance(config, type) and dataclasses.is_dataclass(config)):
        raise ValueError(
            f"objective {name!r} needs a class attribute Config, the dataclass of its options (an empty one for none)"
        )
    try:
        field_types(config)
    except (TypeError, NameError) as error:
        raise ValueError(f"objective {name!r}: {error}") from error
    try:
        check_number("default_lr", found.default_lr, low=0.0, low_is_valid=False)
    except ValueError as error:
        raise ValueError(f"objective {name!r}: {error}") from error
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise ValueError(f"objective {name!r} must define {', '.join(missing)}")
    return found


def _check_needs(name: str, objective: Objective) -> None:
    """Read the needs where a fault in them can still be told as one of this objective."""
    try:
        needs: object = objective.needs
    except ValueError as error:
        raise ValueError(f"objective {name!r}: needs: {error}") from error
    if not isinstance(needs, LogpNeeds):
        raise ValueError(f"objective {name!r}: needs must be a property that gives LogpNeeds(...), not {needs!r}")
