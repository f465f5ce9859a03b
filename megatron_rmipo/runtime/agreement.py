"""Faults that one rank meets and all must raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from megatron_rmipo.errors import CheckpointError, RmipoError

_Result = TypeVar("_Result")


def on_first_rank(group: dist.ProcessGroup, action: Callable[[], _Result]) -> _Result:
    """What ``action`` returned on the first rank of ``group``, whose ranks call this together.

    Raises:
        RmipoError: on every rank, of the kind that it raised there; CheckpointError for an OSError.
    """
    outcome: list[Any] = [None, None]
    if group.rank() == 0:
        try:
            outcome[0] = action()
        except (OSError, RmipoError) as error:
            outcome[1] = (type(error) if isinstance(error, RmipoError) else CheckpointError, str(error))
    dist.broadcast_object_list(outcome, group=group, group_src=0)
    if outcome[1] is not None:
        kind, text = outcome[1]
        raise kind(text)
    result: _Result = outcome[0]
    return result


def on_every_rank(group: dist.ProcessGroup, action: Callable[[], _Result]) -> _Result:
    """What ``action`` returned here, where it raised on no rank of ``group``, whose ranks call this together.

    Raises:
        RmipoError: on every rank, that of the first rank where it raised one; CheckpointError for an OSError.
    """
    result, failure = None, None
    try:
        result = action()
    except (OSError, RmipoError) as error:
        failure = (type(error) if isinstance(error, RmipoError) else CheckpointError, str(error))
    failures: list[Any] = [None] * group.size()
    dist.all_gather_object(failures, failure, group=group)
    for met in failures:
        if met is not None:
            kind, text = met
            raise kind(text)
    return cast(_Result, result)
