"""Shared by the options of all objectives: what one of the same name means, and checks.

A check's ``ValueError`` names the option, the value and what would be valid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# An option means the same in every objective that has it; only defaults differ.
BETA_HELP = "scale of the reward"
LABEL_SMOOTHING_HELP = "assumed share of pairs labelled the wrong way round, 0 to 0.5"
LENGTH_NORMALIZATION_HELP = "reward = beta * mean log-probability per token; off: beta * sum"
GAMMA_BETA_RATIO_HELP = "margin the rewards must differ by, in units of beta: gamma = beta * ratio"
LOG_RATIO_NORMALIZATION_HELP = "log-ratio with the reference of a whole response, sum, or per scored token, mean"
SFT_WEIGHT_HELP = "weight of the token-mean negative log-likelihood of the chosen responses"


def check_number(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_is_valid: bool = True,
    high_is_valid: bool = True,
) -> None:
    """Refuse anything but a finite number in ``[low, high]``, a bound that is not valid left out.

    Raises:
        ValueError: naming option, value and interval.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if number and low <= value <= high and (low_is_valid or value != low) and (high_is_valid or value != high):  # type: ignore[operator]
        return
    bounds = [f"{'at least' if low_is_valid else 'greater than'} {low:g}"] if low > -math.inf else []
    bounds += [f"{'at most' if high_is_valid else 'below'} {high:g}"] if high < math.inf else []
    valid = " and ".join(bounds) or "that is finite"
    raise ValueError(f"{name} must be a number {valid}, not {value!r}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse anything but one of ``choices``.

    Raises:
        ValueError: naming option, value and choices.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def check_switch(name: str, value: object) -> None:
    """Refuse anything but True or False.

    Raises:
        ValueError: naming option and value.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {value!r}")


def in_words(value: object) -> str:
    """An option's value as a flag would have it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
