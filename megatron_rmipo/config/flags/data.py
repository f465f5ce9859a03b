"""What ``--data-path``, ``--valid-data-path`` and ``--split`` say."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from megatron_rmipo.errors import ConfigError


def parse_blend(values: Sequence[str], flag: str = "--data-path") -> list[tuple[float, str]]:
    """``["A"]`` or ``["0.7", "A", "0.3", "B"]`` as (weight, prefix) pairs; the weights are scaled to sum to 1.

    Raises:
        ConfigError: neither one prefix nor weights and prefixes in turn, or a weight that is not positive.
    """
    if len(values) == 1:
        return [(1.0, values[0])]
    form = f"{flag} {' '.join(values)}: expected one PREFIX, or weights and prefixes in turn: 0.7 A 0.3 B"
    if not values or len(values) % 2:
        raise ConfigError(form)
    try:
        weights = [float(weight) for weight in values[::2]]
    except ValueError:
        raise ConfigError(form) from None
    total = sum(weights)
    if not (0 < total < math.inf and all(weight / total > 0 for weight in weights)):
        raise ConfigError(f"{flag} {' '.join(values)}: every weight must be greater than 0, also as a share of their sum")
    return [(weight / total, prefix) for weight, prefix in zip(weights, values[1::2], strict=True)]


def parse_split(split: str) -> tuple[float, float]:
    """``"99,1"`` as the shares (0.99, 0.01) of training and held-out data.

    Raises:
        ConfigError: not two numbers, not positive.
    """
    if not re.fullmatch(r"\s*\d+(\.\d+)?\s*,\s*\d+(\.\d+)?\s*", split) or 0.0 in map(float, split.split(",")):
        raise ConfigError(f"--split {split}: expected the proportions train,valid, both greater than 0, as in 99,1")
    train, valid = map(float, split.split(","))
    return train / (train + valid), valid / (train + valid)
