"""What pairs take in a pack, in tokens and in cost, from their lengths alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from megatron_rmipo.errors import ConfigError


class Backward(NamedTuple):
    """What the backward of a part costs, in units of its forward: a weight's gradient as much, and that of its input.

    Attributes:
        tokens: of what is linear in tokens.
        area: of attention.
        scored_tokens: of the output layer.
    """

    tokens: float = 2.0
    area: float = 2.0
    scored_tokens: float = 2.0


@dataclasses.dataclass(frozen=True)
class CostModel:
    """What a pair costs, in any one unit (floating point operations, say): linear in tokens, in attended area, in scored tokens.

    Attributes:
        per_token: layers, for each token that runs through them.
        per_area: attention, for each (query, key) that is kept.
        per_scored_token: the output layer, for each token that is scored.
        per_windowed_area: as ``per_area``, in layers where a token sees so many others: (tokens, cost), a window each.
        backward: of each part.
    """

    per_token: float
    per_area: float
    per_scored_token: float
    per_windowed_area: tuple[tuple[int, float], ...] = ()
    backward: Backward = Backward()  # noqa: RUF009


# Balance by tokens, where nothing is known of the model.
BY_TOKENS = CostModel(per_token=1.0, per_area=0.0, per_scored_token=0.0)


@dataclasses.dataclass(frozen=True)
class PairSizes:
    """Sizes of a number of pairs under one layout, each a NumPy array over the pairs.

    Attributes:
        tokens: int64, tokens that stand in the row.
        costs: float64, of a forward by the cost model.
        head_costs: float64, of these in the output layer.
        backward_costs, head_backward_costs: float64, the same of a backward.
    """

    tokens: np.ndarray
    costs: np.ndarray
    head_costs: np.ndarray
    backward_costs: np.ndarray
    head_backward_costs: np.ndarray

    def __add__(self, other: PairSizes) -> PairSizes:
        """The same pairs laid out in both ways."""
        names = [field.name for field in dataclasses.fields(self)]
        return PairSizes(*(getattr(self, name) + getattr(other, name) for name in names))


def conditional_sizes(lengths: np.ndarray, cost: CostModel, *, share_prompts: bool, with_rejected: bool) -> PairSizes:
    """Sizes of pairs laid out by :func:`megatron_rmipo.data.batches.packing.pack_pairs`.

    Args:
        lengths: int ``[P, 3]``: prompt, chosen, rejected tokens; 0 for a response that the row does not have.
        cost: the cost model.
        share_prompts, with_rejected: the layout.
    """
    first, before, second, scored = _row_parts(lengths, share_prompts=share_prompts, with_rejected=with_rejected)

    def area(window: int | None) -> np.ndarray:
        seen: np.ndarray = _area(first, window) + _area(before + second, window) - _area(before, window)
        return seen

    return _sizes(first + second, area, scored, cost)


def conditional_tokens(lengths: np.ndarray, *, share_prompts: bool, with_rejected: bool) -> np.ndarray:
    """The tokens of :func:`conditional_sizes` alone, int64 ``[P]``."""
    first, _, second, _ = _row_parts(lengths, share_prompts=share_prompts, with_rejected=with_rejected)
    tokens: np.ndarray = first + second
    return tokens


def _row_parts(lengths: np.ndarray, *, share_prompts: bool, with_rejected: bool) -> tuple[np.ndarray, ...]:
    """Tokens of the first segment, what the second one sees before it, second segment, what is scored; int64 ``[P]`` each."""
    prompt, chosen, rejected = np.array(np.asarray(lengths).T, dtype=np.int64, order="C")
    scored = chosen + rejected if with_rejected else chosen
    lead = np.where(chosen > 0, chosen, scored)  # the response that stands behind its prompt, in one segment
    other = scored - lead
    first = np.where(lead > 0, prompt + lead - 1, 0)
    if share_prompts:
        second, before = np.maximum(other - 1, 0), prompt
    else:
        second, before = np.where(other > 0, prompt + other - 1, 0), np.zeros_like(prompt)
    return first, before, second, scored


def unconditional_sizes(lengths: np.ndarray, cost: CostModel, *, has_context_token: bool, with_rejected: bool) -> PairSizes:
    """Sizes of the responses alone, laid out by :func:`megatron_rmipo.data.batches.packing.pack_responses`."""
    per_response = _tokens_alone(lengths, has_context_token=has_context_token, with_rejected=with_rejected)
    return _sizes(per_response.sum(1), lambda window: _area(per_response, window).sum(1), per_response.sum(1), cost)


def unconditional_tokens(lengths: np.ndarray, *, has_context_token: bool, with_rejected: bool) -> np.ndarray:
    """The tokens of :func:`unconditional_sizes` alone, int64 ``[P]``."""
    tokens: np.ndarray = _tokens_alone(lengths, has_context_token=has_context_token, with_rejected=with_rejected).sum(1)
    return tokens


def _tokens_alone(lengths: np.ndarray, *, has_context_token: bool, with_rejected: bool) -> np.ndarray:
    responses = np.asarray(lengths, dtype=np.int64)[:, 1 : 3 if with_rejected else 2]
    return responses if has_context_token else np.maximum(responses - 1, 0)


def _area(length: np.ndarray, window: int | None) -> np.ndarray:
    """(query, key) that are kept in sequences of some lengths: a token sees itself and those before it, or the last of them."""
    growing = length if window is None else np.minimum(length, window)
    area: np.ndarray = growing * (growing + 1) // 2 + (length - growing) * growing
    return area


def _sizes(tokens: np.ndarray, area: Callable[[int | None], np.ndarray], scored: np.ndarray, cost: CostModel) -> PairSizes:
    attention = cost.per_area * area(None) + sum(per_area * area(window) for window, per_area in cost.per_windowed_area)
    layers, head, backward = cost.per_token * tokens, cost.per_scored_token * scored, cost.backward
    head_backward = backward.scored_tokens * head
    return PairSizes(
        tokens,
        layers + attention + head,
        head,
        backward.tokens * layers + backward.area * attention + head_backward,
        head_backward,
    )


@dataclasses.dataclass(frozen=True)
class Largest:
    """The largest of some numbers, and how many are too large: (which, how large, how many); -1 and 0 of none."""

    which: int
    size: int
    num_too_large: int

    @classmethod
    def of(cls, pieces: Iterable[tuple[int, np.ndarray]], limit: int) -> Largest:
        """Of the pairs of a data set, which come in pieces: (the first pair, int ``[P]``)."""
        which, size, num_too_large = -1, 0, 0
        for first, numbers in pieces:
            here = int(numbers.argmax())
            if which < 0 or numbers[here] > size:
                which, size = first + here, int(numbers[here])
            num_too_large += int(np.count_nonzero(numbers > limit))
        return cls(which, size, num_too_large)


def check_capacity(
    pieces: Iterable[tuple[int, np.ndarray]],
    max_tokens: int,
    describe: Callable[[int], str],
    *,
    name: str = "--tokens-per-microbatch",
) -> int:
    """Refuse a data set with a pair that fits no pack.

    Args:
        pieces: tokens of its pairs, as of :meth:`Largest.of`.
        max_tokens: of a pack.
        describe: where a pair can be looked up.
        name: what ``max_tokens`` is called where it was given.

    Returns:
        Tokens of the largest pair; 0 without pairs.

    Raises:
        ConfigError: names the largest pair, its tokens and the value that would work.
    """
    largest = Largest.of(pieces, max_tokens)
    if largest.num_too_large:
        needed = largest.size
        raise ConfigError(
            f"{name} {max_tokens}: {describe(largest.which)} needs {needed} tokens in one pack, and "
            f"{largest.num_too_large} pairs in all do not fit. Use {name} {needed} or more, or prepare the data with a smaller "
            "--seq-length."
        )
    return largest.size
