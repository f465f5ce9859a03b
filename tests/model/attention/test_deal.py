"""How a row is dealt to context-parallel ranks: every token once, as many each, and as even in attention as blocks allow."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from megatron_rmipo.model.attention import deal as dealing
from megatron_rmipo.model.attention.deal import RowShare, attention_areas, deal, held_triples, runs_of, whole_runs
from tests.model.attention.rows import dense_mask, random_segments


def filled_up(segments: npt.NDArray[np.int64], multiple: int) -> npt.NDArray[np.int64]:
    """The row with padding up to a multiple."""
    end = int(segments[-1, :2].sum())
    return np.vstack([segments, [[end, -end % multiple, 0, 0]]]) if end % multiple else segments


def row_like_real_ones(seed: int, num_tokens: int, multiple: int) -> npt.NDArray[np.int64]:
    """Pairs of log-normal lengths, as those of UltraFeedback: a few hundred tokens in the middle, a few thousand at most."""
    random = np.random.default_rng(seed)
    segments: list[list[int]] = []
    start = 0
    while True:
        prompt, chosen, rejected = (int(length) for length in np.exp(random.normal([5.5, 5.6, 5.6], 0.9)).clip(8, 3000))
        if start + prompt + chosen + rejected > num_tokens:
            return filled_up(np.array(segments), multiple)
        segments += [[start, prompt + chosen, 0, 0], [start + prompt + chosen, rejected, start, prompt]]
        start += prompt + chosen + rejected


@pytest.mark.parametrize("cp_size", [2, 3, 4, 8])
def test_every_token_is_dealt_once_and_to_each_rank_as_many(cp_size: int) -> None:
    for seed in range(6):
        segments = filled_up(random_segments(seed, pairs=5, longest=90).numpy(), cp_size)
        places = deal(segments, cp_size)
        assert places.shape == (cp_size, segments[-1, :2].sum() // cp_size)
        assert (np.diff(places, axis=1) > 0).all()
        assert sorted(places.ravel().tolist()) == list(range(places.size))
        assert np.array_equal(places, deal(segments, cp_size))


@pytest.mark.parametrize("cp_size", [2, 4, 8])
def test_attention_is_even_over_ranks(cp_size: int) -> None:
    """With FlexAttention's tiles, the coarsest blocks, and with a pair of which a prompt is nearly all."""
    rows = [row_like_real_ones(seed, tokens, 128 * cp_size) for seed in range(8) for tokens in (16384, 65536)]
    rows += [np.array([[0, 98304, 0, 0], [98304, 4096, 0, 94208]]), np.array([[0, 102400, 0, 0]])]
    for segments in rows:
        areas = attention_areas(segments, deal(segments, cp_size))
        assert areas.max() / areas.mean() <= 1.05
    # In the order of the row the last rank of one long segment computes nearly twice the mean.
    as_it_stands = attention_areas(rows[-1], np.arange(102400).reshape(cp_size, -1))
    assert as_it_stands.max() / as_it_stands.mean() > 1.4


def test_two_blocks_each_of_one_segment_are_the_zigzag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dealing, "BLOCKS_EACH", 2)
    found = sorted((deal(np.array([[0, 1024, 0, 0]]), 4)[:, ::128] // 128).tolist())
    assert found == [[0, 7], [1, 6], [2, 5], [3, 4]]


def test_blocks_are_whole_tiles_where_a_share_is() -> None:
    segments = row_like_real_ones(3, 16384, 512)
    for own in deal(segments, 4):
        begins = own[np.r_[True, np.diff(own) != 1]]
        assert (begins % 128 == 0).all()
        assert begins.size <= dealing.BLOCKS_EACH


def test_runs_see_what_their_tokens_see() -> None:
    segments = filled_up(random_segments(2, pairs=4, longest=40).numpy(), 3)
    mask = dense_mask(torch.from_numpy(segments)).numpy()
    for places in deal(segments, 3):
        runs = runs_of(segments, places)
        queries = np.concatenate([np.arange(start, start + length) for start, length, *_ in runs])
        assert np.array_equal(queries, places)
        for start, length, own_start, prefix_start, prefix_length in runs:
            for query in range(start, start + length):
                seen = [*range(prefix_start, prefix_start + prefix_length), *range(own_start, query + 1)]
                assert np.flatnonzero(mask[query]).tolist() == sorted(seen)
    assert np.array_equal(runs_of(segments, np.arange(mask.shape[0])), whole_runs(segments))


def test_each_triple_is_scored_by_the_rank_that_holds_its_source() -> None:
    segments = filled_up(random_segments(7, pairs=3, longest=30).numpy(), 4)
    num_tokens = int(segments[-1, :2].sum())
    source = torch.from_numpy(np.random.default_rng(0).integers(0, num_tokens, 41))
    seen, ungraded = [], 0
    for rank in range(4):
        share = RowShare(segments, 4, rank, torch.device("cpu"))
        held = held_triples(source, share, 11)
        assert torch.equal(share.places[held.source], source[held.numbers])
        assert held.num_ungraded == int((held.numbers >= 30).sum())
        seen += held.numbers.tolist()
        ungraded += held.num_ungraded
        assert torch.equal(share.dealt[share.order], torch.arange(num_tokens))
    assert (sorted(seen), ungraded) == (list(range(41)), 11)
