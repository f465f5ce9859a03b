"""The orders that there are, by the names under which runs keep theirs."""

from __future__ import annotations

from typing import Literal, get_args

from megatron_rmipo.data.batches.order import PairOrder
from megatron_rmipo.data.batches.permuted_order import PermutedOrder
from megatron_rmipo.errors import ConfigError

OrderName = Literal["keyed", "permuted"]
# Of new runs.
NEW_ORDER: OrderName = "keyed"
# Of runs that kept no name.
UNNAMED_ORDER: OrderName = "permuted"


def pair_order(name: str, num_pairs: int, seed: int) -> PairOrder:
    """The order of a run over so many pairs.

    Args:
        name: as the run kept it; "" of one that kept none.
        num_pairs, seed: as of :class:`megatron_rmipo.data.batches.order.PairOrder`.

    Raises:
        ConfigError: there is no order of this name.
    """
    check_order(name)
    kind = {"keyed": PairOrder, "permuted": PermutedOrder}[name or UNNAMED_ORDER]
    return kind(num_pairs, seed)


def check_order(name: str) -> None:
    """Refuse a name that stands for no order.

    Raises:
        ConfigError: naming those that there are.
    """
    if name and name not in get_args(OrderName):
        raise ConfigError(
            f"order {name!r}: this version knows the orders of pairs {' and '.join(map(repr, get_args(OrderName)))}. Go on with "
            "the version that began the run."
        )
