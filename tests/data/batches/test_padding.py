"""Padded rows against the definition: which token predicts which, in which row, and how a global batch is cut."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.padded_batches import PaddedBatchBuilder
from megatron_rmipo.data.batches.padding import (
    PaddedRows,
    PaddedShape,
    cut_by_length,
    pad_pairs,
    pad_pairs_and_responses,
    pad_responses,
    row_lengths,
)
from megatron_rmipo.data.batches.sizes import CostModel
from megatron_rmipo.errors import ConfigError
from tests.data.batches.test_packing import PAIRS, UNPAIRED, expected
from tests.integration.problem import collection, make_pairs, unpaired

SHAPE = PaddedShape(vocab_size=99)


def contexts(rows: PaddedRows) -> list[list[tuple[list[int], int]]]:
    """Per response: for each scored token the ids it is predicted from, in order, and the id; from labels and mask alone."""
    found = []
    for tokens, labels, mask in zip(rows.token_ids.tolist(), rows.labels.tolist(), rows.loss_mask.tolist(), strict=True):
        found.append([(tokens[: place + 1], labels[place]) for place, scored in enumerate(mask) if scored])
    return found


BEHIND = [expected(p.prompt.tolist(), r.tolist()) for p in PAIRS for r in (p.chosen, p.rejected)]


def test_a_row_for_each_response_behind_its_prompt() -> None:
    rows = pad_pairs(PAIRS, [4, 0, -1], SHAPE)
    assert contexts(rows) == BEHIND
    assert rows.token_ids.shape == (6, 5)
    assert rows.token_ids[1].tolist() == [1, 10, 11, 30, 0]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 6
    assert rows.pair_numbers.tolist() == [4, 4, 0, 0, -1, -1]
    assert rows.branches.tolist() == [0, 1] * 3
    assert rows.lengths.tolist() == [3, 2, 1, 4, 2, 1]
    assert rows.num_padding == 6 * 5 - (5 + 4 + 1 + 4 + 3 + 2)
    assert (rows.num_tokens, rows.num_scored, rows.num_responses, rows.num_alone) == (30, 13, 6, 0)
    tensors = (rows.token_ids, rows.position_ids, rows.source, rows.target, rows.lengths, rows.pair_numbers, rows.branches)
    assert {tensor.dtype for tensor in tensors} == {torch.int64}


@pytest.mark.parametrize(("context", "lengths"), [(1, [3, 2, 1, 4, 2, 1]), (None, [2, 1, 0, 3, 1, 0])])
def test_responses_alone(context: int | None, lengths: list[int]) -> None:
    before, skipped = ([], 1) if context is None else ([context], 0)
    alone = [expected(before, r.tolist())[skipped:] for p in PAIRS for r in (p.chosen, p.rejected)]
    rows = pad_responses(PAIRS, [0, 1, 2], SHAPE, context_token_id=context)
    assert contexts(rows) == alone
    assert rows.lengths.tolist() == lengths
    both = pad_pairs_and_responses(PAIRS, [0, 1, 2], SHAPE, context_token_id=context)
    assert contexts(both) == BEHIND + alone
    assert (both.num_alone, both.num_responses, both.num_tokens) == (6, 12, 60)
    assert both.pair_numbers.tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert both.branches.tolist() == [0, 1] * 6


def test_a_response_that_is_not_there_is_a_row_of_padding() -> None:
    rows = pad_pairs(UNPAIRED, [0, 1, 2, 3], SHAPE)
    assert rows.lengths.view(-1, 2).tolist() == [[0, 2], [3, 0], [0, 1], [1, 0]]
    assert not rows.token_ids[0].any()
    assert contexts(rows)[3] == contexts(rows)[0] == []
    chosen = PaddedShape(99, with_rejected=False)
    assert pad_pairs(UNPAIRED, [0, 1, 2, 3], chosen).lengths.tolist() == [0, 3, 0, 1]
    assert pad_pairs(UNPAIRED[:1], [0], chosen).token_ids.tolist() == [[0]]


@pytest.mark.parametrize(("shape", "length"), [({"multiple_of": 4}, 8), ({"pad_to": 11}, 11), ({"multiple_of": 5}, 5)])
def test_lengths_of_rows(shape: dict[str, int], length: int) -> None:
    rows = pad_pairs(PAIRS, [0, 1, 2], PaddedShape(99, **shape))  # type: ignore[arg-type]
    assert rows.token_ids.shape == (6, length)
    assert contexts(rows) == BEHIND


def test_rows_of_other_tensors_are_the_same_rows() -> None:
    for rows, alone in ((pad_pairs(PAIRS, [0, 1, 2], SHAPE), False),
                        (pad_pairs_and_responses(PAIRS, [0, 1, 2], SHAPE, context_token_id=1), True)):  # fmt: skip
        tensors = (rows.token_ids, rows.labels, rows.loss_mask.float(), rows.position_ids)
        again = PaddedRows.of_tensors(*tensors, vocab_size=99, with_rejected=True, with_alone=alone)
        for name in ("token_ids", "source", "target", "lengths", "pair_numbers", "branches"):
            assert torch.equal(getattr(again, name), getattr(rows, name)), name
        assert again.num_alone == rows.num_alone
    with pytest.raises(ConfigError, match="5 rows: each pair takes 2"):
        PaddedRows.of_tensors(*(one[:5] for one in tensors), vocab_size=99, with_rejected=True, with_alone=False)


def test_cut_by_length_takes_every_pair_once_and_like_with_like() -> None:
    longest = np.random.default_rng(3).integers(4, 300, size=53)
    cut = cut_by_length(longest, 3, 4)
    packs = [pack for rank in cut for pack in rank]
    assert sorted(itertools.chain(*packs)) == list(range(53))
    assert {len(pack) for pack in packs} == {4, 5}
    for number in range(3):
        assert min(longest[pack].min() for pack in (rank[number] for rank in cut)) >= max(
            longest[rank[number + 1]].max() for rank in cut
        )
    assert cut_by_length(longest[:2], 2, 2) == [[[int(longest[:2].argmax())], []], [[int(longest[:2].argmin())], []]]


def builder(rank: int, num_pairs: int | None = None, **shape: int) -> PaddedBatchBuilder:
    pairs = collection(make_pairs())
    pairs.match_anew()
    layout = BatchLayout(rank, 2, 1, CostModel(1.0, 0.0, 0.0), unconditional="bos", bos_token_id=1, num_microbatches=3)
    return PaddedBatchBuilder(pairs, layout, PaddedShape(83, num_pairs=num_pairs, **shape))


def test_every_pass_has_the_same_pairs_in_the_same_micro_batch() -> None:
    batches = [builder(rank).build(np.array([5, 2, 9, 23, 17, 11, 4])) for rank in range(2)]
    numbers = []
    for batch in batches:
        of = [[row.pair_numbers.tolist() for row in rows] for rows in (batch.conditional, batch.unconditional, batch.mismatched)]
        assert of[0] == of[1] == of[2]
        numbers += [number for pack in of[0] for number in pack]
    assert sorted(numbers) == sorted([*range(7), *range(7)])
    assert [len(batch.conditional) for batch in batches] == [3, 3]


def test_one_shape_for_all_micro_batches_with_fillers_that_do_not_count() -> None:
    batch = builder(1, num_pairs=2, pad_to=36, multiple_of=3).build(np.array([5, 2, 9, 23]))
    for rows in (batch.conditional, batch.unconditional, batch.mismatched):
        assert [tuple(row.token_ids.shape) for row in rows] == [(4, 36)] * 3
        (first, *filler), (second, *other), last = (row.pair_numbers[::2].tolist() for row in rows)
        assert first != second
        assert min(first, second) >= 0
        assert [filler, other, last] == [[-1], [-1], [-1, -1]]


@pytest.mark.parametrize(
    ("shape", "message"),
    [({"pad_to": 20}, "pad_to 20: pair .* of memory needs rows of .* Use"), ({"pad_to": 36, "multiple_of": 5}, "no multiple")],
)
def test_what_fits_no_row_is_refused_at_once(shape: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        builder(0, **shape)


def test_lengths_of_a_pair_are_those_of_its_longest_row() -> None:
    pairs = unpaired(make_pairs())
    lengths = collection(pairs).lengths_of(np.arange(len(pairs)))
    for with_rejected in (True, False):
        shape = PaddedShape(83, with_rejected=with_rejected)
        for number, pair in enumerate(pairs):
            if pair.chosen.size or with_rejected:
                longest = row_lengths(lengths, with_rejected=with_rejected)[number]
                assert pad_pairs([pair], [0], shape).token_ids.shape[1] == max(1, longest)
