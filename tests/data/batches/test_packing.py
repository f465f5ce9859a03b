"""Packed rows against the definition: which token predicts which, from which context."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_rmipo.data.batches.packing import PackedRow, pack_pairs, pack_pairs_and_responses, pack_responses
from megatron_rmipo.data.store.pair_store import TokenizedPair

NONE = np.empty(0, dtype=np.int64)
PAIRS = [
    TokenizedPair(np.array([1, 10, 11]), np.array([20, 21, 22]), np.array([30, 31])),
    TokenizedPair(np.array([1]), np.array([40]), np.array([50, 51, 52, 53])),
    TokenizedPair(np.array([1, 12]), np.array([60, 61]), np.array([70])),
]
UNPAIRED = [
    TokenizedPair(np.array([1, 10, 11]), NONE, np.array([30, 31])),
    TokenizedPair(np.array([1, 12, 13, 14]), np.array([20, 21, 22]), NONE),
    TokenizedPair(np.array([1]), NONE, np.array([70])),
    TokenizedPair(np.array([1, 15]), np.array([60]), NONE),
]


def visible(row: PackedRow, position: int) -> list[tuple[int, int]]:
    """(position id, token id) of everything the token at ``position`` attends to, itself included, from the segments alone."""
    seen: list[int] = []
    for start, length, prefix_start, prefix_length in row.segments.tolist():
        if start <= position < start + length:
            seen = [*range(prefix_start, prefix_start + prefix_length), *range(start, position + 1)]
    return [(int(row.position_ids[index]), int(row.token_ids[index])) for index in seen]


def contexts(row: PackedRow) -> list[list[tuple[list[int], int]]]:
    """Per response: for each scored token the ids it is predicted from, in order, and the id."""
    result: list[list[tuple[list[int], int]]] = [[] for _ in range(row.num_responses)]
    for source, target, response in zip(row.source.tolist(), row.target.tolist(), row.response.tolist(), strict=True):
        seen = visible(row, source)
        assert [place for place, _ in seen] == list(range(len(seen))), "positions must count through prompt and response"
        result[response].append(([token for _, token in seen], target))
    return result


def expected(context: list[int], response: list[int]) -> list[tuple[list[int], int]]:
    return [(context + response[:place], response[place]) for place in range(len(response))]


@pytest.mark.parametrize("share_prompts", [True, False])
def test_every_response_token_is_predicted_from_its_prompt_and_its_own_past(share_prompts: bool) -> None:
    row = pack_pairs(PAIRS, [4, 0, 2], share_prompts=share_prompts)
    want = [expected(p.prompt.tolist(), r.tolist()) for p in PAIRS for r in (p.chosen, p.rejected)]
    assert contexts(row) == want
    assert row.pair_numbers.tolist() == [4, 4, 0, 0, 2, 2]
    assert row.branches.tolist() == [0, 1] * 3
    assert row.lengths.tolist() == [3, 2, 1, 4, 2, 1]


@pytest.mark.parametrize("share_prompts", [True, False])
def test_a_response_that_is_not_there_keeps_its_place_and_takes_no_tokens(share_prompts: bool) -> None:
    row = pack_pairs(UNPAIRED, [4, 0, 2, -1], share_prompts=share_prompts)
    assert contexts(row) == [
        [],
        [([1, 10, 11], 30), ([1, 10, 11, 30], 31)],
        [([1, 12, 13, 14], 20), ([1, 12, 13, 14, 20], 21), ([1, 12, 13, 14, 20, 21], 22)],
        [],
        [],
        [([1], 70)],
        [([1, 15], 60)],
        [],
    ]
    assert row.token_ids.tolist() == [1, 10, 11, 30, 1, 12, 13, 14, 20, 21, 1, 1, 15]
    assert row.segments.tolist() == [[0, 4, 0, 0], [4, 6, 0, 0], [10, 1, 0, 0], [11, 2, 0, 0]]
    assert row.lengths.view(-1, 2).tolist() == [[0, 2], [3, 0], [0, 1], [1, 0]]
    assert row.pair_numbers.tolist() == [4, 4, 0, 0, 2, 2, -1, -1]
    assert row.branches.tolist() == [0, 1] * 4
    assert {tensor.dtype for tensor in (row.source, row.target, row.response, row.lengths)} == {torch.int64}


def test_undesirable_rows_read_for_their_chosen_response_take_no_tokens() -> None:
    row = pack_pairs(UNPAIRED, [0, 1, 2, 3], with_rejected=False)
    assert row.token_ids.tolist() == [1, 12, 13, 14, 20, 21, 1, 15]
    assert row.lengths.tolist() == [0, 3, 0, 1]
    empty = pack_pairs(UNPAIRED[:1], [0], with_rejected=False, multiple_of=2)
    assert (empty.num_scored, empty.num_tokens, empty.num_padding, empty.lengths.tolist()) == (0, 2, 2, [0])


@pytest.mark.parametrize(("context", "lengths"), [(1, [0, 2, 3, 0, 0, 1, 1, 0]), (None, [0, 1, 2, 0, 0, 0, 0, 0])])
def test_responses_that_are_not_there_have_no_log_probs_of_their_own(context: int | None, lengths: list[int]) -> None:
    row = pack_responses(UNPAIRED, [4, 0, 2, 1], context_token_id=context)
    before, skipped = ([], 1) if context is None else ([context], 0)
    assert contexts(row) == [expected(before, r.tolist())[skipped:] for p in UNPAIRED for r in (p.chosen, p.rejected)]
    assert row.lengths.tolist() == lengths
    assert row.num_tokens == sum(lengths)
    assert row.pair_numbers.tolist() == [4, 4, 0, 0, 2, 2, 1, 1]
    assert row.branches.tolist() == [0, 1] * 4


def test_shared_prompts_stand_once_and_last_tokens_not_at_all() -> None:
    shared, apart = pack_pairs(PAIRS, [0, 1, 2]), pack_pairs(PAIRS, [0, 1, 2], share_prompts=False)
    prompts, responses = sum(p.prompt.size for p in PAIRS), sum(p.chosen.size + p.rejected.size for p in PAIRS)
    assert shared.num_tokens == prompts + responses - 6
    assert apart.num_tokens == 2 * prompts + responses - 6
    assert shared.num_padding == 0


def test_chosen_alone() -> None:
    row = pack_pairs(PAIRS, [0, 1, 2], with_rejected=False)
    assert contexts(row) == [expected(p.prompt.tolist(), p.chosen.tolist()) for p in PAIRS]
    assert row.branches.tolist() == [0, 0, 0]


def test_responses_alone_after_bos() -> None:
    row = pack_responses(PAIRS, [0, 1, 2], context_token_id=1)
    assert contexts(row) == [expected([1], r.tolist()) for p in PAIRS for r in (p.chosen, p.rejected)]


def test_responses_alone_without_context_leave_the_first_token_unscored() -> None:
    row = pack_responses(PAIRS, [0, 1, 2], context_token_id=None)
    want = [expected([], r.tolist())[1:] for p in PAIRS for r in (p.chosen, p.rejected)]
    assert contexts(row) == want
    assert row.lengths.tolist() == [2, 1, 0, 3, 1, 0]


@pytest.mark.parametrize("multiple_of", [2, 8])
def test_padding_is_a_segment_of_its_own(multiple_of: int) -> None:
    plain, padded = pack_pairs(PAIRS, [0, 1, 2]), pack_pairs(PAIRS, [0, 1, 2], multiple_of=multiple_of)
    assert padded.num_tokens % multiple_of == 0
    assert padded.num_tokens == plain.num_tokens + padded.num_padding
    assert contexts(padded) == contexts(plain)
    if padded.num_padding:
        assert padded.segments[-1].tolist() == [plain.num_tokens, padded.num_padding, 0, 0]


def test_a_row_where_nothing_is_scored_still_has_a_token() -> None:
    pair = TokenizedPair(np.array([1]), np.array([5]), np.array([6]))
    row = pack_responses([pair], [0], context_token_id=None, multiple_of=2)
    assert row.num_scored == 0
    assert row.num_tokens == row.num_padding == 2
    assert row.lengths.tolist() == [0, 0]


def test_everything_is_int64_and_covered_by_segments() -> None:
    row = pack_pairs(PAIRS, [0, 1, 2], multiple_of=4)
    tensors = (row.token_ids, row.position_ids, row.segments, row.source, row.target, row.response, row.lengths)
    assert {tensor.dtype for tensor in tensors} == {torch.int64}
    assert torch.equal(row.segments[1:, 0], (row.segments[:, 0] + row.segments[:, 1])[:-1])
    assert int(row.segments[-1, :2].sum()) == row.num_tokens


@pytest.mark.parametrize("pairs", [PAIRS, UNPAIRED], ids=["pairs", "unpaired"])
@pytest.mark.parametrize("context", [1, None])
@pytest.mark.parametrize("settings", [{}, {"share_prompts": False}, {"with_rejected": False}], ids=str)
def test_responses_alone_in_the_row_of_their_pairs(
    pairs: list[TokenizedPair], context: int | None, settings: dict[str, bool]
) -> None:
    numbers = [4, 0, 2, -1][: len(pairs)]
    with_rejected = settings.get("with_rejected", True)
    behind = pack_pairs(pairs, numbers, **settings)  # type: ignore[arg-type]
    alone = pack_responses(pairs, numbers, context_token_id=context, with_rejected=with_rejected)
    row = pack_pairs_and_responses(pairs, numbers, context_token_id=context, multiple_of=8, **settings)  # type: ignore[arg-type]
    assert contexts(row) == contexts(behind) + contexts(alone)
    assert (row.num_alone, row.num_alone_tokens) == (alone.num_responses, alone.num_tokens)
    assert row.num_alone_scored == alone.num_scored
    assert row.num_alone == behind.num_responses
    assert row.num_tokens == behind.num_tokens + alone.num_tokens + row.num_padding
    assert row.num_tokens % 8 == 0
    for name in ("lengths", "pair_numbers", "branches"):
        assert getattr(row, name).tolist() == [*getattr(behind, name).tolist(), *getattr(alone, name).tolist()]
