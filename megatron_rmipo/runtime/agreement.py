"""Faults that one rank meets and all must raise, and what two ranks differ in."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist

from megatron_rmipo.errors import CheckpointError, RmipoError

_Result = TypeVar("_Result")
_SHOWN_FIELDS, _SHOWN_CHARACTERS = 5, 160
# A rank that works while others wait meets them this often, which is within any timeout of use.
_LIFE_SECONDS = 1.0


class _Outcome(NamedTuple):
    """What came of an action: its result, or the kind and text of its failure; or that it still works."""

    result: Any = None
    failure: tuple[type[RmipoError], str] | None = None
    works: bool = False


_WORKS = _Outcome(works=True)


def on_first_rank(group: dist.ProcessGroup, action: Callable[[], _Result]) -> _Result:
    """What ``action`` returned on the first rank of ``group``, whose ranks call this together.

    It may take any time: while it works, the first rank gives signs of life from a thread. A first rank that gives none within
    the timeout of the group, or is gone, is told as by any collective.

    Args:
        group: the ranks.
        action: calls no collective.

    Raises:
        RmipoError: on every rank, of the kind that it raised there; CheckpointError for an OSError.
    """
    device = device_of(group)

    def tell(outcome: _Outcome) -> _Outcome:
        told = [outcome]
        dist.broadcast_object_list(told, group=group, group_src=0, device=device)
        return told[0]

    if group.rank() == 0:
        outcome = tell(_try_while_others_wait(group, action, tell))
    else:
        while (outcome := tell(_WORKS)).works:
            pass
    if outcome.failure is not None:
        kind, text = outcome.failure
        raise kind(text)
    return cast(_Result, outcome.result)


def on_every_rank(group: dist.ProcessGroup, action: Callable[[], _Result]) -> _Result:
    """What ``action`` returned here, where it raised on no rank of ``group``, whose ranks call this together.

    Args:
        group: the ranks, which wait for the slowest of them no longer than for any collective.
        action: takes about as long on all of them, or calls collectives. What does neither is for :func:`on_each_rank_alone`.

    Raises:
        RmipoError: on every rank, that of the first rank where it raised one; CheckpointError for an OSError.
    """
    return cast(_Result, _where_none_failed(group, _try(action)))


def on_each_rank_alone(group: dist.ProcessGroup, action: Callable[[], _Result]) -> _Result:
    """As :func:`on_every_rank`, of what may take much longer on one rank than on others, which wait for it.

    A rank that works gives signs of life, as in :func:`on_first_rank`.

    Args:
        group: the ranks.
        action: calls no collective.

    Raises:
        RmipoError: as :func:`on_every_rank`.
    """
    device = device_of(group)
    outcome = _try_while_others_wait(group, action, lambda _works: _is_true_anywhere(group, True, device))
    while _is_true_anywhere(group, False, device):
        pass
    return cast(_Result, _where_none_failed(group, outcome))


def _try_while_others_wait(group: dist.ProcessGroup, action: Callable[[], Any], meet: Callable[[_Outcome], object]) -> _Outcome:
    if group.size() == 1:
        return _try(action)
    with _signs_of_life(lambda: meet(_WORKS)):
        return _try(action)


@contextlib.contextmanager
def _signs_of_life(meet: Callable[[], object]) -> Iterator[None]:
    """Call ``meet`` in a thread every now and then, until the block ends; what it raises is raised at that end."""
    ended, failures = threading.Event(), list[BaseException]()

    def give() -> None:
        try:
            while not ended.wait(_LIFE_SECONDS):
                meet()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=give, name="signs-of-life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if failures:
        raise failures[0]


def _try(action: Callable[[], Any]) -> _Outcome:
    try:
        return _Outcome(result=action())
    except (OSError, RmipoError) as error:
        return _Outcome(failure=(type(error) if isinstance(error, RmipoError) else CheckpointError, str(error)))


def _where_none_failed(group: dist.ProcessGroup, outcome: _Outcome) -> Any:
    for _, (kind, text) in gather_faults(group, outcome.failure):
        raise kind(text)
    return outcome.result


def _is_true_anywhere(group: dist.ProcessGroup, here: bool, device: torch.device) -> bool:
    found = torch.tensor([here], dtype=torch.int32, device=device)
    dist.all_reduce(found, group=group)
    return bool(found.item())


def gather_faults(group: dist.ProcessGroup, fault: _Result | None) -> list[tuple[int, _Result]]:
    """What ranks of ``group`` found wrong, None for nothing: (rank, fault) in their order, the same on every rank.

    All ranks of the group call it together. Where nobody found anything, which is the rule, one number is reduced.
    """
    if not _is_true_anywhere(group, fault is not None, device_of(group)):
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
    """Where the tensors lie that the ranks of ``group`` send each other. Asked for in the main thread: another has GPU 0."""
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
