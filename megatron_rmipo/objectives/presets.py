"""Options that a preset fills in, or that another option makes meaningless: those left out are None until then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_rmipo.objectives.options import check_choice, in_words

PRESET_HELP = "paper (default): as printed; official: as the authors' trainer computes it. Fills the switches left unset"
# What a configuration that names no preset starts from.
DEFAULT_PRESET = "paper"


def preset_defaults(config: Any, presets: Mapping[str, Mapping[str, object]]) -> Mapping[str, object]:
    """What the preset of ``config`` (:data:`DEFAULT_PRESET` where it names none) gives the options it fills in.

    Raises:
        ValueError: there is no such preset.
    """
    if config.preset is None:
        return presets[DEFAULT_PRESET]
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


def settle_preset(config: Any, presets: Mapping[str, Mapping[str, object]]) -> None:
    """Name the preset where none was given; refuse one all of whose options (those that are not None) are the other's.

    Not given, it is the one that the filled options agree with: any of them with the default, or all with the other. A saved
    configuration holds the preset and every option; so it reads back the same, and another preset on top of it is not ignored
    silently.

    Args:
        config: the options, filled from :func:`preset_defaults`.
        presets: preset -> option -> value; there are two, which differ in every option.

    Raises:
        ValueError: naming the options and the preset they are.
    """
    preset = config.preset or DEFAULT_PRESET
    options = {name: getattr(config, name) for name in presets[preset] if getattr(config, name) is not None}
    if any(value == presets[preset][name] for name, value in options.items()):
        fill_option(config, "preset", preset)
        return
    other = next(name for name in presets if name != preset)
    if config.preset is not None:
        given = ", ".join(f"{name} {in_words(value)}" for name, value in options.items())
        raise ValueError(
            f"preset {preset!r} would do nothing: with {given} it is preset {other!r}; "
            f"give preset {other!r} in its place, or leave these options out"
        )
    fill_option(config, "preset", other)
