"""How a global batch is shared out to ranks, and a share cut into packs. Pure functions: the same on every rank."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np

from megatron_rmipo.data.batches.sizes import PairSizes

# Exchanges end where the costliest share is this close to the mean, or after so many.
EVEN_ENOUGH, MAX_EXCHANGES = 1.001, 64


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


def cut_into_packs(share: Sequence[int], sizes: PairSizes, max_tokens: int, least_packs: int = 1) -> list[list[int]]:
    """Cut one rank's pairs into packs of at most ``max_tokens`` tokens, as few as an even spread of cost allows.

    Args:
        share: positions of the pairs.
        sizes: of every pair of the global batch, by position.
        max_tokens: capacity of a pack (``--tokens-per-microbatch``).
        least_packs: not fewer than so many, where there are pairs for them.

    Returns:
        Packs of positions, none empty, the positions of a pack in ascending order.
    """
    if not share:
        return []
    tokens = sizes.tokens
    assert max(int(tokens[position]) for position in share) <= max_tokens, "checked against the data set before training"
    # At least one: rows whose layout is empty (one-token responses without a context) need a place too.
    num_packs = max(1, math.ceil(sum(int(tokens[position]) for position in share) / max_tokens), min(least_packs, len(share)))
    costs = sizes.costs[list(share)]
    while True:
        packs = [[share[member] for member in pack] for pack in spread_evenly(costs, num_packs)]
        if all(sum(int(tokens[position]) for position in pack) <= max_tokens for pack in packs):
            return [sorted(pack) for pack in packs if pack]
        num_packs += 1


def fill_packs(share: Sequence[int], sizes: PairSizes, max_tokens: int, num_packs: int) -> list[list[int]] | None:
    """Cut one rank's pairs into just ``num_packs`` packs of at most ``max_tokens`` tokens, as even in cost as they allow.

    Returns:
        The packs, positions of each in ascending order, empty ones last; None where they do not fit, or no way was found that
        they do.
    """
    positions = np.asarray(share, dtype=np.int64)
    for measure in (sizes.costs, sizes.tokens.astype(np.float64)):
        packs = [[share[member] for member in pack] for pack in spread_evenly(measure[positions], num_packs)]
        if all(sum(int(sizes.tokens[position]) for position in pack) <= max_tokens for pack in packs):
            return sorted((sorted(pack) for pack in packs), key=lambda pack: not pack)
    return None


def split_packs(packs: Sequence[Sequence[int]], sizes: PairSizes, num_packs: int) -> list[list[int]]:
    """The same pairs in ``num_packs`` packs, the costliest ones split in two; fewer where each has a single pair."""
    split = [list(pack) for pack in packs]
    while len(split) < num_packs:
        divisible = [number for number, pack in enumerate(split) if len(pack) > 1]
        if not divisible:
            break
        pack = split.pop(max(divisible, key=lambda number: float(sizes.costs[split[number]].sum())))
        split += [sorted(pack[member] for member in half) for half in spread_evenly(sizes.costs[pack], 2)]
    return split


def cheapest_at_both_ends(packs: Sequence[Sequence[int]], sizes: PairSizes) -> list[list[int]]:
    """The packs in the order in which a pipeline waits least: it fills and drains with the cheapest, the costliest between."""
    by_cost = sorted(packs, key=lambda pack: float(sizes.costs[list(pack)].sum()))
    return [list(pack) for pack in [*by_cost[::2], *by_cost[1::2][::-1]]]
