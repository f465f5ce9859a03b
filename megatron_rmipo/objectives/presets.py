"""Options that a preset fills in, or that another option makes meaningless: those left out are None until then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def fill_option(config: Any, name: str, default: object) -> None:
    """Give an option of a frozen dataclass its default where it was left out."""
    if getattr(config, name) is None:
        object.__setattr__(config, name, default)


def refuse_option(config: Any, name: str, reason: str) -> None:
    """Refuse an option that was set although it means nothing.

    Raises:
        ValueError: naming option, value and reason.
    """
    if getattr(config, name) is not None:
        raise ValueError(f"{name} {getattr(config, name)!r} would do nothing: {reason}; leave it out")


def check_preset(config: Any, presets: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse a preset all of whose options (those that are not None) are set to another preset's.

    A saved configuration holds every option; another preset on top of it must not be ignored silently.

    Args:
        config: the options, filled; ``config.preset`` is one of ``presets``.
        presets: preset -> option -> value; there are two.

    Raises:
        ValueError: naming the options and the preset they are.
    """
    switches = {name: getattr(config, name) for name in presets[config.preset] if getattr(config, name) is not None}
    if all(value != presets[config.preset][name] for name, value in switches.items()):
        other = next(name for name in presets if name != config.preset)
        given = ", ".join(f"{name} {value}" for name, value in switches.items())
        raise ValueError(f"preset {config.preset!r} would do nothing: {given} is preset {other!r}; leave them out")
