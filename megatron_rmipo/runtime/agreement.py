"""Faults that one rank meets and all must raise, and what two ranks differ in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from megatron_rmipo.errors import CheckpointError, RmipoError

_Result = TypeVar("_Result")
_SHOWN_FIELDS, _SHOWN_CHARACTERS = 5, 160


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
    for _, (kind, text) in gather_faults(group, failure):
        raise kind(text)
    return cast(_Result, result)


def gather_faults(group: dist.ProcessGroup, fault: _Result | None) -> list[tuple[int, _Result]]:
    """What ranks of ``group`` found wrong, None for nothing: (rank, fault) in their order, the same on every rank.

    All ranks of the group call it together. Where nobody found anything, which is the rule, one number is reduced.
    """
    found = torch.tensor([fault is not None], dtype=torch.int32, device=device_of(group))
    dist.all_reduce(found, group=group)
    if not found.item():
        return []
    faults: list[Any] = [None] * group.size()
    dist.all_gather_object(faults, fault, group=group)
    return [(rank, one) for rank, one in enumerate(faults) if one is not None]


def is_same(group: dist.ProcessGroup, facts: Mapping[str, Any]) -> bool:
    """Whether ``facts`` are the same on all ranks of ``group``, which call this together: one number is reduced."""
    number = int(digest_of(facts)[:15], 16)
    ends = torch.tensor([number, -number], dtype=torch.int64, device=device_of(group))
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
    most, least = ends.tolist()
    return bool(most == -least)


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Where the tensors lie that the ranks of ``group`` send each other."""
    on_gpu = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def digest_of(facts: Mapping[str, Any]) -> str:
    """Hex digest over names and values (what JSON holds; other types as their text), whatever their order."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True, default=str).encode()).hexdigest()


def describe_difference(here: Mapping[str, Any], there: Mapping[str, Any], here_name: str, there_name: str) -> str:
    """The first fact in which two ranks differ, with both values, and which others do.

    Args:
        here, there: facts of the two by name, not the same; what others follow from comes first.
        here_name, there_name: what the two ranks are called.
    """
    absent = object()
    names = [name for name in {**here, **there} if here.get(name, absent) != there.get(name, absent)]
    first, others = names[0], names[1:]
    shown = ", ".join(others[:_SHOWN_FIELDS]) + (", ..." if len(others) > _SHOWN_FIELDS else "")
    more = f" {len(others)} more differ: {shown}." if others else ""
    return (
        f"the ranks would not run the same: {first} is {_shown(here.get(first))} on {here_name}, but "
        f"{_shown(there.get(first))} on {there_name}.{more} Nothing was started. Give every rank the same arguments, "
        "environment, software and files."
    )


def _shown(value: Any) -> str:
    text = "not set" if value is None else str(value) or "empty"
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
