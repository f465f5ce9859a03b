"""Numbers that stand beside each pair in the data, where an option says that they are read.

Shape letter: P pairs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_rmipo.objectives.base import PairLogps
from megatron_rmipo.objectives.options import check_number, check_switch
from megatron_rmipo.objectives.presets import fill_option, refuse_option

PAIR_MARGIN_HELP = "the rewards must differ by each pair's margin, in units of reward, from the data's column of that name"
PAIR_BETA_HELP = "each pair's beta from the data's column of that name, in place of beta"


def settle_pair_columns(config: Any, default_beta: float) -> None:
    """Check the switches ``pair_margin`` and ``pair_beta``, and fill in ``beta`` where it means something.

    Raises:
        ValueError: an option is outside its range, or beta is set beside the pairs' own.
    """
    check_switch("pair_margin", config.pair_margin)
    check_switch("pair_beta", config.pair_beta)
    if config.pair_beta:
        refuse_option(config, "beta", "pair_beta takes each pair's beta from the data")
    else:
        fill_option(config, "beta", default_beta)
        check_number("beta", config.beta, low=0.0, low_is_valid=False)


def columns_read(config: Any) -> tuple[str, ...]:
    """The columns that the options ask for."""
    asked = {"margin": config.pair_margin, "beta": config.pair_beta}
    return tuple(column for column, is_read in asked.items() if is_read)


def beta_of(config: Any, logps: PairLogps) -> Tensor | float:
    """What rewards are scaled by: a number, or fp32 ``[P]``."""
    return logps.columns["beta"] if config.pair_beta else float(config.beta)


def margin_of(config: Any, logps: PairLogps) -> Tensor | float:
    """What the difference of rewards is measured against, besides the objective's own margin: 0, or fp32 ``[P]``."""
    return logps.columns["margin"] if config.pair_margin else 0.0
