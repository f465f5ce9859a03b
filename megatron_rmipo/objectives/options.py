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
SFT_WEIGHT_HELP = "weight of the token-mean negative log-likelihood of the chosen responses"


def check_number(name: str, value: object, *, low: float = -math.inf, high: float = math.inf, low_is_valid: bool = True) -> None:
    """Refuse anything but a finite number in ``[low, high]`` (``(low, high]`` when ``low_is_valid`` is False).

    Raises:
        ValueError: naming option, value and interval.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if number and low <= value <= high and (low_is_valid or value != low):  # type: ignore[operator]
        return
    if high < math.inf:
        valid = f"between {low:g} and {high:g}"
    elif low > -math.inf:
        valid = f"{'at least' if low_is_valid else 'greater than'} {low:g}"
    else:
        valid = "finite"
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
