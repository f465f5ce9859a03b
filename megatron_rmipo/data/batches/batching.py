"""Which pairs make a global batch, and how it is cut into packs. Pure functions: the same on every rank, exact over a resume."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Sequence

import numpy as np

from megatron_rmipo.errors import ConfigError

# Exchanges end where the costliest share is this close to the mean, or after so many.
EVEN_ENOUGH, MAX_EXCHANGES = 1.001, 64


@dataclasses.dataclass(frozen=True)
class PairOrder:
    """The order in which a run sees pairs: every epoch a new permutation of all of them.

    Attributes:
        num_pairs: pairs in the data set.
        seed: of the permutations.
    """

    num_pairs: int
    seed: int

    def epoch(self, number: int) -> np.ndarray:
        """Indices of all pairs in the order of epoch ``number`` (from 0), int64 ``[num_pairs]``."""
        return np.random.default_rng((self.seed, number)).permutation(self.num_pairs)

    def batch(self, consumed_pairs: int, size: int, total_pairs: int) -> np.ndarray:
        """Indices of the next global batch.

        Args:
            consumed_pairs: pairs seen so far in the run; all that the order depends on besides the seed.
            size: global batch size.
            total_pairs: where the run ends; the last batch may be smaller.
        """
        end = min(consumed_pairs + size, total_pairs)
        assert consumed_pairs < end, (consumed_pairs, total_pairs)
        parts = []
        for number in range(consumed_pairs // self.num_pairs, (end - 1) // self.num_pairs + 1):
            first = number * self.num_pairs
            parts.append(self.epoch(number)[max(consumed_pairs - first, 0) : end - first])
        return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class CostModel:
    """What a pair costs, in any one unit (floating point operations, say): linear in tokens, in attended area, in scored tokens.

    Attributes:
        per_token: layers, for each token that runs through them.
        per_area: attention, for each (query, key) that is kept.
        per_scored_token: the output layer, for each token that is scored.
    """

    per_token: float
    per_area: float
    per_scored_token: float


@dataclasses.dataclass(frozen=True)
class PairSizes:
    """Sizes of a number of pairs under one layout, each a NumPy array over the pairs.

    Attributes:
        tokens: int64, tokens that stand in the row.
        costs: float64, by the cost model.
    """

    tokens: np.ndarray
    costs: np.ndarray


def conditional_sizes(lengths: np.ndarray, cost: CostModel, *, share_prompts: bool, with_rejected: bool) -> PairSizes:
    """Sizes of pairs laid out by :func:`megatron_rmipo.data.batches.packing.pack_pairs`.

    Args:
        lengths: int ``[P, 3]``: prompt, chosen, rejected tokens; 0 for a response that the row does not have.
        cost: the cost model.
        share_prompts, with_rejected: the layout.
    """
    prompt, chosen, rejected = np.asarray(lengths, dtype=np.int64).T
    scored = chosen + rejected if with_rejected else chosen
    lead = np.where(chosen > 0, chosen, scored)  # the response that stands behind its prompt, in one segment
    other = scored - lead
    first = np.where(lead > 0, prompt + lead - 1, 0)
    if share_prompts:
        second = np.maximum(other - 1, 0)
        area = _causal(first) + _causal(second) + second * prompt
    else:
        second = np.where(other > 0, prompt + other - 1, 0)
        area = _causal(first) + _causal(second)
    return _sizes(first + second, area, scored, cost)


def unconditional_sizes(lengths: np.ndarray, cost: CostModel, *, has_context_token: bool, with_rejected: bool) -> PairSizes:
    """Sizes of the responses alone, laid out by :func:`megatron_rmipo.data.batches.packing.pack_responses`."""
    responses = np.asarray(lengths, dtype=np.int64)[:, 1 : 3 if with_rejected else 2]
    per_response = responses if has_context_token else np.maximum(responses - 1, 0)
    return _sizes(per_response.sum(1), _causal(per_response).sum(1), per_response.sum(1), cost)


def _causal(length: np.ndarray) -> np.ndarray:
    area: np.ndarray = length * (length + 1) // 2
    return area


def _sizes(tokens: np.ndarray, area: np.ndarray, scored: np.ndarray, cost: CostModel) -> PairSizes:
    return PairSizes(tokens, cost.per_token * tokens + cost.per_area * area + cost.per_scored_token * scored)


def spread_evenly(costs: np.ndarray, num_shares: int) -> list[list[int]]:
    """Share pairs out, to data-parallel ranks or to packs, so that the costliest share costs as little as possible.

    Longest processing time first: each pair, costliest first, goes to the share that has least so far. Then the costliest share
    exchanges a pair for a cheaper one of another share, as long as that helps.

    Returns:
        For each share its pairs, as positions in ``costs``, costliest first. A share may get none.
    """
    share_of = np.empty(len(costs), dtype=np.int64)
    heap = [(0.0, number) for number in range(num_shares)]
    by_cost = np.argsort(-costs, kind="stable").tolist()
    for position in by_cost:
        load, number = heapq.heappop(heap)
        share_of[position] = number
        heapq.heappush(heap, (load + float(costs[position]), number))
    loads = np.zeros(num_shares)
    for load, number in heap:
        loads[number] = load
    _exchange_pairs(costs, share_of, loads)
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    for position in by_cost:
        shares[share_of[position]].append(position)
    return shares


def _exchange_pairs(costs: np.ndarray, share_of: np.ndarray, loads: np.ndarray) -> None:
    """Even out ``loads``, the cost of each share, by exchanges of two pairs; changes ``share_of`` and ``loads``."""
    # Not the mean: its rounding may depend on the machine, and every rank must stop at the same exchange.
    even_enough = EVEN_ENOUGH * math.fsum(loads) / len(loads)
    for _ in range(MAX_EXCHANGES):
        costliest = int(loads.argmax())
        if loads[costliest] <= even_enough:
            return
        own = np.flatnonzero(share_of == costliest)
        # Of two shares a gap apart, moving a difference d lowers the larger by the smaller of d and gap - d.
        difference = costs[own, None] - costs[None, :]
        gain = np.minimum(difference, loads[costliest] - loads[share_of] - difference)
        row, other = divmod(int(gain.argmax()), len(costs))
        # Below this, rounding could exchange the same pairs for ever.
        if not gain[row, other] > 1e-9 * loads[costliest]:
            return
        position, partner = own[row], share_of[other]
        share_of[position], share_of[other] = partner, costliest
        loads[costliest] -= difference[row, other]
        loads[partner] += difference[row, other]


def cut_into_packs(share: Sequence[int], sizes: PairSizes, max_tokens: int) -> list[list[int]]:
    """Cut one rank's pairs into packs of at most ``max_tokens`` tokens, as few as an even spread of cost allows.

    Args:
        share: positions of the pairs.
        sizes: of every pair of the global batch, by position.
        max_tokens: capacity of a pack (``--tokens-per-microbatch``).

    Returns:
        Packs of positions, none empty, the positions of a pack in ascending order.
    """
    if not share:
        return []
    tokens = sizes.tokens
    assert max(int(tokens[position]) for position in share) <= max_tokens, "checked against the data set before training"
    # At least one: rows whose layout is empty (one-token responses without a context) need a place too.
    num_packs = max(1, math.ceil(sum(int(tokens[position]) for position in share) / max_tokens))
    costs = sizes.costs[list(share)]
    while True:
        packs = [[share[member] for member in pack] for pack in spread_evenly(costs, num_packs)]
        if all(sum(int(tokens[position]) for position in pack) <= max_tokens for pack in packs):
            return [sorted(pack) for pack in packs if pack]
        num_packs += 1


def check_capacity(
    sizes: PairSizes, max_tokens: int, describe: Callable[[int], str], flag: str = "--tokens-per-microbatch"
) -> None:
    """Refuse a data set with a pair that fits no pack.

    Raises:
        ConfigError: names the largest pair, its tokens and the value that would work.
    """
    if sizes.tokens.size and int(sizes.tokens.max()) > max_tokens:
        largest = int(sizes.tokens.argmax())
        needed, num_too_large = int(sizes.tokens[largest]), int((sizes.tokens > max_tokens).sum())
        raise ConfigError(
            f"{flag} {max_tokens}: {describe(largest)} needs {needed} tokens in one pack, and {num_too_large} pairs in all do "
            f"not fit. Use {flag} {needed} or more, or prepare the data with a smaller --seq-length."
        )
