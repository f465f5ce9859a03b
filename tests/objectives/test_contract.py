"""Slips of an objective of one's own are told with its name, the field and what is expected."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.base import LossOutput
from megatron_rmipo.objectives.contract import check_output, check_prepared, check_state
from megatron_rmipo.objectives.simpo import Simpo

OBJECTIVE, PAIRS = Simpo(), torch.zeros(3)


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (LossOutput(PAIRS.mean(), {}), r"simpo: 'losses' is \[\] for 3 pairs"),
        (LossOutput(PAIRS, {"gap": PAIRS.mean()}), r"simpo: 'gap' is \[\] for 3 pairs"),
        (LossOutput(PAIRS, {"gap": 0.5}), "simpo: 'gap' is float for 3 pairs"),  # type: ignore[dict-item]
        (LossOutput(PAIRS, {"gap": PAIRS}, ("gaps",)), "names 'gaps', which is no metric"),
    ],
)
def test_outputs(output: LossOutput, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_output(OBJECTIVE, output, 3)


def test_what_is_right_passes() -> None:
    check_output(OBJECTIVE, LossOutput(PAIRS, {"gap": PAIRS}, ("gap",)), 3)
    check_prepared(OBJECTIVE, {"mean": torch.tensor(1.0), "weight": PAIRS}, 3)
    check_state(OBJECTIVE, {"mean": 1.5, "count": 2})


@pytest.mark.parametrize(("value", "told"), [(0.5, "'mean' as float"), (torch.zeros(2), r"'mean' as \[2\]")])
def test_prepared_values(value: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_prepared(OBJECTIVE, {"mean": value}, 3)


@pytest.mark.parametrize("value", [torch.tensor(1.0), float("nan"), "1"])
def test_state_values(value: Any) -> None:
    with pytest.raises(ConfigError, match="simpo: its state holds 'mean' as"):
        check_state(OBJECTIVE, {"mean": value})
