"""Options that a preset fills in, or that another option makes meaningless: those left out are None until then.

An objective's presets are a mapping: preset -> option -> value. The first is the default, what a configuration that names none
starts from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_rmipo.objectives.options import check_choice, in_words

Presets = Mapping[str, Mapping[str, object]]


def preset_defaults(config: Any, presets: Presets) -> Mapping[str, object]:
    """What the preset of ``config`` (the first of ``presets`` where it names none) gives the options it fills in.

    Raises:
        ValueError: there is no such preset.
    """
    if config.preset is None:
        return presets[next(iter(presets))]
    check_choice("preset", config.preset, tuple(presets))
    return presets[config.preset]


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


def settle_preset(config: Any, presets: Presets) -> None:
    """Name the preset where none was given; refuse one of which none of the options in force (those that are not None) is left.

    Not given, it is the one that all of the options agree with; else the default, which those left out came from, unless none of
    them is its own: then the one that most agree with. A saved configuration holds the preset and every option; so it reads back
    the same, and another preset on top of it is not ignored silently.

    Args:
        config: the options, filled from :func:`preset_defaults`.
        presets: of its objective; each value that an option in force can have is some preset's.

    Raises:
        ValueError: naming the options and the preset they are nearest to.
    """
    default = next(iter(presets))
    options = {name: getattr(config, name) for name in presets[default] if getattr(config, name) is not None}
    agreeing = {preset: sum(values[name] == value for name, value in options.items()) for preset, values in presets.items()}
    nearest = max(agreeing, key=agreeing.__getitem__)
    if config.preset is not None and not agreeing[config.preset]:
        given = ", ".join(f"{name} {in_words(value)}" for name, value in options.items())
        raise ValueError(
            f"preset {config.preset!r} would do nothing: {given} leave nothing of it; "
            f"give preset {nearest!r} in its place, or leave these options out"
        )
    fill_option(config, "preset", nearest if agreeing[nearest] == len(options) or not agreeing[default] else default)
