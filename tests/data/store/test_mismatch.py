"""Which rows' responses stand behind which prompts, and how long they may be."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_rmipo.data.store.mismatch import _LARGE_GROUP, MismatchedStore, PromptGroups
from megatron_rmipo.data.store.pair_store import TokenizedPair
from megatron_rmipo.errors import DataError
from tests.integration.problem import PairList, make_pairs


def store(prompts: list[list[int]]) -> PairList:
    """Rows of the given prompts; row n answers with token 100 + n (chosen) and twice 200 + n (rejected)."""
    return PairList([TokenizedPair(np.array(p), np.array([100 + n]), np.array([200 + n] * 2)) for n, p in enumerate(prompts)])


@pytest.mark.parametrize(
    ("prompts", "partners"),
    [
        ("AB", [1, 0]),
        ("ABC", [1, 2, 0]),
        ("AABBB", [2, 3, 0, 1, 0]),  # the third B takes the first A again
        ("AAABB", [3, 4, 3, 0, 1]),
        ("ABBA", [2, 3, 0, 1]),  # the last A stands together with the first
        ("BBAAB", [3, 2, 4, 0, 2]),
    ],
)
def test_rows_take_the_next_prompts_rows_in_turn(prompts: str, partners: list[int]) -> None:
    # Prompts of one length, so that they are told apart by their tokens, and one that is longer.
    rows = store([[ord(letter)] * (2 if letter == "C" else 1) for letter in prompts])
    found = MismatchedStore(rows).partners_of(np.arange(len(prompts)))  # type: ignore[arg-type]
    assert found.tolist() == partners
    assert all(prompts[row] != prompts[partner] for row, partner in enumerate(found))


def partners_of_all(prompts: list[list[int]]) -> list[int]:
    """The same by way of all groups at once."""
    num_rows = len(prompts)
    starts = [row for row in range(num_rows) if prompts[row] != prompts[row - 1]]
    members = [
        [row % num_rows for row in range(start, end if end > start else end + num_rows)]
        for start, end in zip(starts, starts[1:] + starts[:1], strict=True)
    ]
    partners = [0] * num_rows
    for own, following in zip(members, members[1:] + members[:1], strict=True):
        for offset, row in enumerate(own):
            partners[row] = following[offset % len(following)]
    return partners


@pytest.mark.parametrize("sizes", [[1] * 40, [3, 1, 2, 9, 30, 1, 17, 5], [_LARGE_GROUP + 7, 5, 2 * _LARGE_GROUP + 1, 2000]])
def test_long_groups_and_those_that_go_on_at_the_first_row(sizes: list[int]) -> None:
    rng = np.random.default_rng(8)
    # Of one length or two, and with few ids, so that neighbours are often told apart by one token alone.
    kinds = [[7, number % 3, number // 3, *[4] * int(rng.integers(2))] for number in range(len(sizes))]
    prompts = [kinds[number] for number, size in enumerate(sizes) for _ in range(size)]
    for shift in (0, 3, sizes[-1] // 2):
        moved = prompts[shift:] + prompts[:shift]
        found = MismatchedStore(store(moved)).partners_of(rng.permutation(len(moved)))  # type: ignore[arg-type]
        in_order = MismatchedStore(store(moved)).partners_of(np.arange(len(moved)))  # type: ignore[arg-type]
        assert in_order.tolist() == partners_of_all(moved)
        assert sorted(found.tolist()) == sorted(in_order.tolist())


def test_a_large_group_is_read_once() -> None:
    rows = store([[1]] * 5000 + [[2]] * 3)
    groups = PromptGroups(rows)  # type: ignore[arg-type]
    assert groups.of(2500) == (0, 5000)
    rows.prompt = None  # type: ignore[assignment, method-assign]
    assert [groups.of(row) for row in (0, 17, 4999)] == [(0, 5000)] * 3


def test_every_prompt_gets_another_one_s_responses() -> None:
    pairs = [*make_pairs(), TokenizedPair(np.arange(30), np.arange(2), np.arange(3)), TokenizedPair(*map(np.arange, (2, 20, 3)))]
    mismatched = MismatchedStore(PairList(pairs))  # type: ignore[arg-type]
    longest = max(p.prompt.size + max(p.chosen.size, p.rejected.size) for p in pairs)
    num_cut = 0
    for row, pair in enumerate(pairs):
        made, other = mismatched[row], pairs[(row + 1) % len(pairs)]
        assert made.prompt.tolist() == pair.prompt.tolist()
        room = longest - pair.prompt.size
        assert made.chosen.tolist() == other.chosen[:room].tolist()
        assert made.rejected.tolist() == other.rejected[:room].tolist()
        assert mismatched.lengths_of(np.array([row]))[0].tolist() == [made.prompt.size, made.chosen.size, made.rejected.size]
        num_cut += made.chosen.size < other.chosen.size or made.rejected.size < other.rejected.size
    assert len(mismatched) == len(pairs)
    assert num_cut > 0, "the problem must have a response that is cut"


@pytest.mark.parametrize("count", [1, 4])
def test_one_prompt_alone_cannot_be_mismatched(count: int) -> None:
    with pytest.raises(DataError, match=r"memory: all [14] prompts are the same"):
        MismatchedStore(store([[5, 6]] * count))  # type: ignore[arg-type]
