"""Blends, splits, and the global batch as data-parallel ranks see it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rmipo.data.batches.batch_builder import BatchBuilder
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.order import PairOrder
from megatron_rmipo.data.batches.pipeline_bubble import Stages, fastest_packs
from megatron_rmipo.data.batches.read_ahead import _read_ahead, iterate_batches
from megatron_rmipo.data.batches.sizes import Backward, CostModel
from megatron_rmipo.data.store.chunks import ROWS_AT_A_TIME
from megatron_rmipo.data.store.collection import PairCollection, Span
from tests.data.orphans import count_files, workers_left_by
from tests.integration.problem import PairList, collection, make_pairs

COST = CostModel(1.0, 0.01, 1.0)


def layout(dp_rank: int = 0, dp_size: int = 1, **changes: object) -> BatchLayout:
    settings = {"tokens_per_microbatch": 120, "cost": COST, "unconditional": "bos", "bos_token_id": 1, **changes}
    return BatchLayout(dp_rank=dp_rank, dp_size=dp_size, **settings)  # type: ignore[arg-type]


def test_ranks_together_hold_every_pair_of_the_batch_once() -> None:
    pairs = collection(make_pairs())
    indices = np.array([3, 20, 7, 1, 11, 13, 5])
    batches = [BatchBuilder(pairs, layout(rank, 3)).build(indices) for rank in range(3)]
    for rows in ([row for b in batches for row in b.conditional], [row for b in batches for row in b.unconditional]):
        numbers = torch.cat([row.pair_numbers for row in rows]).tolist()
        assert sorted(numbers) == sorted([*range(7), *range(7)])
    for batch in batches:
        assert batch.num_pairs == 7
        assert batch.mean_chosen_length == pytest.approx(np.mean([pairs[i].chosen.size for i in indices]))
        assert all(row.num_tokens <= 120 for row in batch.conditional)
    assert {batch.num_tokens for batch in batches} == {
        sum(r.num_tokens for b in batches for r in b.conditional + b.unconditional)
    }


def test_rows_of_whole_blocks_count_their_padding_and_score_none_of_it() -> None:
    pairs, indices = collection(make_pairs()), np.array([3, 20, 7, 1, 11])
    plain, padded = (BatchBuilder(pairs, layout(multiple_of=multiple)).build(indices) for multiple in (1, 128))
    assert (plain.num_padding, plain.num_tokens) == (0, padded.num_tokens)
    assert padded.num_padding == sum(row.num_tokens for row in padded.rows) - padded.num_tokens
    for one, other in zip(plain.rows, padded.rows, strict=True):
        assert (other.num_tokens % 128, other.num_padding) == (0, other.num_tokens - one.num_tokens)
        assert other.source.tolist() == one.source.tolist()
        assert other.target.tolist() == one.target.tolist()
        # In ascending order the last one: none lies in the padding.
        assert int(other.source.max()) < one.num_tokens


def test_a_rank_without_pairs_runs_a_filler_that_does_not_count() -> None:
    batch = BatchBuilder(collection(make_pairs()), layout(2, 3)).build(np.array([3, 20]))
    assert [row.pair_numbers.tolist() for row in batch.conditional] == [[-1, -1]]
    assert [row.pair_numbers.tolist() for row in batch.unconditional] == [[-1, -1]]


@pytest.mark.parametrize(("tokens", "dp_size", "fills"), [(48, 3, False), (120, 3, False), (120, 2, False), (48, 9, True)])
def test_ranks_that_meet_in_layers_run_as_many_packs_each(tokens: int, dp_size: int, fills: bool) -> None:
    settings = {"tokens_per_microbatch": tokens, "dp_size": dp_size}
    pairs, indices = collection(make_pairs()), np.array([3, 20, 7, 1, 11, 13, 5])
    alone = [BatchBuilder(pairs, layout(rank, **settings)).build(indices) for rank in range(dp_size)]
    ranks = [BatchBuilder(pairs, layout(rank, equal_packs=True, **settings)).build(indices) for rank in range(dp_size)]
    assert {len(batch.conditional) for batch in ranks} == {max(len(batch.conditional) for batch in alone)}
    assert {len(batch.unconditional) for batch in ranks} == {max(len(batch.unconditional) for batch in alone)}
    for rows in ([row for one in ranks for row in one.conditional], [row for one in ranks for row in one.unconditional]):
        numbers = [number for row in rows for number in row.pair_numbers.tolist()]
        assert sorted(number for number in numbers if number >= 0) == sorted([*range(7), *range(7)])
        assert (-1 in numbers) == fills


@pytest.mark.parametrize("equal_packs", [False, True])
def test_each_pass_has_packs_for_every_stage_where_pairs_allow(equal_packs: bool) -> None:
    pairs, indices = collection(make_pairs()), np.arange(23)
    settings = {"tokens_per_microbatch": 900, "equal_packs": equal_packs, "min_packs_per_stage": 2}
    for num_stages, expected in ((1, 1), (2, 4), (3, 6), (9, 12 if equal_packs else 11)):
        builders = [BatchBuilder(pairs, layout(rank, 2, stages=Stages.even(num_stages), **settings)) for rank in range(2)]
        batches = [builder.build(indices) for builder in builders]
        passes = [rows for batch in batches for rows in (batch.conditional, batch.unconditional)]
        assert min(map(len, passes)) == expected
        for number in (0, 1):
            numbers = [n for rows in passes[number::2] for row in rows for n in row.pair_numbers.tolist() if n >= 0]
            assert sorted(numbers) == sorted([*range(23), *range(23)])
        cost, passes_of = builders[0].pass_costs(indices, [0, 1])
        assert cost == batches[0].cost == batches[1].cost
        for batch, own in zip(batches, passes_of, strict=True):
            assert [one.backward for one in own] == [False, True]
            assert [len(one.layers) for one in own] == [len(batch.unconditional), len(batch.conditional)]
            for one, other in zip(own, batch.passes, strict=True):
                assert one.layers.tolist() == other.layers.tolist()
                assert one.head.tolist() == other.head.tolist()
        if not equal_packs:
            assert sum(one.work for own in passes_of for one in own) == pytest.approx(cost)
            for one in (one for own in passes_of for one in own):
                costs = (one.layers + one.head).tolist()
                peak = costs.index(max(costs))
                assert costs == sorted(costs[:peak]) + sorted(costs[peak:], reverse=True), "the cheapest stand at both ends"


def test_unless_told_each_pass_has_as_many_packs_as_are_fastest_for_its_tokens() -> None:
    pairs, indices = collection(make_pairs()), np.arange(23)
    batch = BatchBuilder(pairs, layout(stages=Stages.even(9), tokens_per_microbatch=10**6)).build(indices)
    for sizes, rows in (
        (layout().conditional_sizes(pairs.lengths_of(indices)), batch.conditional),
        (layout().unconditional_sizes(pairs.lengths_of(indices)), batch.unconditional),
    ):
        assert len(rows) == fastest_packs(int(sizes.tokens.sum()), Stages.even(9)) > 1
    few = BatchBuilder(pairs, layout(stages=Stages.even(9), tokens_per_microbatch=10**6, min_packs_per_stage=0)).build(indices)
    assert len(few.conditional) == len(few.unconditional) == 1


def test_what_a_rank_runs_is_costed_pass_by_pass() -> None:
    pairs, indices = collection(make_pairs()), np.array([3, 20, 7])
    batch = BatchBuilder(pairs, layout(forward_passes=1)).build(indices)
    alone, again, gradient = batch.passes
    lengths = pairs.lengths_of(indices).astype(float)
    assert [one.backward for one in batch.passes] == [False, False, True]
    assert gradient.head.sum() == alone.head.sum() == lengths[:, 1:].sum(), "each token of a response is scored"
    assert again.layers.tolist() == gradient.layers.tolist()
    assert sum(one.work for one in batch.passes) == pytest.approx(batch.cost)
    # Whatever a backward costs over its forward.
    frozen = dataclasses.replace(COST, backward=Backward(1.25, 2.0, 1.0))
    batch = BatchBuilder(pairs, layout(forward_passes=1, cost=frozen)).build(indices)
    assert sum(one.work for one in batch.passes) == pytest.approx(batch.cost)
    assert batch.passes[-1].head_back.tolist() == batch.passes[-1].head.tolist()
    tokens = batch.gradient_tokens.sum()
    assert batch.passes[-1].layers_back.sum() == pytest.approx(
        2 * batch.passes[-1].layers.sum() - 0.75 * frozen.per_token * tokens
    )
    # Ranks that meet in layers run their packs at one time: the costliest sets each.
    apart = [BatchBuilder(pairs, layout(rank, 2)).build(indices).passes[1] for rank in range(2)]
    together = [BatchBuilder(pairs, layout(rank, 2, equal_packs=True)).build(indices).passes[1] for rank in range(2)]
    assert together[0].layers.tolist() == together[1].layers.tolist() == [max(one.layers[0] for one in apart)]


def test_workers_give_the_same_batches_and_a_later_start_the_same_tail() -> None:
    pairs = collection(make_pairs())
    builder, order = BatchBuilder(pairs, layout()), PairOrder(len(pairs), 3)
    plain = list(iterate_batches(builder, order, batch_size=5, total_pairs=33))
    workers = list(iterate_batches(builder, order, batch_size=5, total_pairs=33, num_workers=2))
    tail = list(iterate_batches(builder, order, batch_size=5, total_pairs=33, consumed_pairs=15))
    assert [batch.num_pairs for batch in plain] == [5] * 6 + [3]
    for one, other in (*zip(plain, workers, strict=True), *zip(plain[3:], tail, strict=True)):
        assert one.pair_indices.tolist() == other.pair_indices.tolist()
        assert [row.token_ids.tolist() for row in one.conditional] == [row.token_ids.tolist() for row in other.conditional]


def test_what_workers_send_is_the_batch_itself() -> None:
    pairs = collection(make_pairs())
    pairs.reference_scores = [np.arange(48, dtype=np.float32).reshape(24, 2)]
    builder, order = BatchBuilder(pairs, layout()), PairOrder(len(pairs), 3)
    (sent,) = iterate_batches(builder, order, batch_size=7, total_pairs=7, num_workers=1)
    built = builder.build(order.batch(0, 7, 7))
    for field in dataclasses.fields(built):
        mine, theirs = getattr(built, field.name), getattr(sent, field.name)
        if isinstance(mine, np.ndarray):
            assert (mine.dtype, mine.tolist()) == (theirs.dtype, theirs.tolist())
        elif not isinstance(mine, list):
            assert mine == theirs
    assert len(sent.conditional) == len(built.conditional) > 1
    for mine, theirs in zip(built.rows, sent.rows, strict=True):
        for name, tensor in vars(mine).items():
            if isinstance(tensor, torch.Tensor):
                received = getattr(theirs, name)
                assert received.dtype == tensor.dtype
                assert torch.equal(received, tensor)
                received += 1  # memory of its own, and not read-only
            else:
                assert getattr(theirs, name) == tensor


def test_the_next_batch_is_received_while_one_is_used() -> None:
    asked = [threading.Event() for _ in range(3)]

    def source() -> Iterator[Any]:
        for number, event in enumerate(asked):
            event.set()
            yield number

    batches = _read_ahead(source())
    assert next(batches) == 0
    assert asked[1].wait(60)
    assert not asked[2].is_set()
    assert list(batches) == [1, 2]


def test_what_fails_in_a_worker_fails_where_the_batch_is_wanted() -> None:
    pairs = collection(make_pairs())
    builder, order = BatchBuilder(pairs, layout(tokens_per_microbatch=1)), PairOrder(len(pairs), 3)
    batches = iterate_batches(builder, order, batch_size=5, total_pairs=33, num_workers=1)
    with pytest.raises(AssertionError, match="checked against the data set before training"):
        next(batches)


FAILING = """
from tests.data.batches.test_batch_builder import BatchBuilder, PairOrder, collection, iterate_batches, layout, make_pairs

pairs = collection(make_pairs())
builder, order = BatchBuilder(pairs, layout()), PairOrder(len(pairs), 3)
# Something still holds the batches when the process ends.
batches = iterate_batches(builder, order, batch_size=5, total_pairs=3300, num_workers=2)
next(batches)
raise RuntimeError("a step failed")
"""


def test_a_process_ends_though_a_step_failed_with_workers_at_work() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAILING], capture_output=True, text=True, check=False, timeout=120, cwd=Path(__file__).parents[3]
    )
    assert done.returncode == 1
    assert "RuntimeError: a step failed" in done.stderr


class PretendBuilder:
    """Batches of so many bytes, each made in so many seconds; a file in ``folder`` for each that was begun."""

    def __init__(self, folder: Path, num_bytes: int, seconds: float) -> None:
        self.folder, self.num_bytes, self.seconds = folder, num_bytes, seconds

    def build(self, pair_indices: np.ndarray) -> bytes:
        tempfile.mkstemp(dir=self.folder)
        time.sleep(self.seconds)
        return bytes(self.num_bytes)


def start_two_workers(folder: Path, num_bytes: int, seconds: float) -> None:
    builder: Any = PretendBuilder(folder, num_bytes, seconds)
    batches = iterate_batches(builder, PairOrder(24, 3), batch_size=5, total_pairs=33000, num_workers=2)
    time.sleep(1000)
    next(batches)


# torch has two batches made ahead by each worker; a pipe holds 64 KiB.
@pytest.mark.parametrize(
    ("num_bytes", "seconds", "begun"),
    [(1, 1000, 2), (2**20, 0, 4), (1, 0, 4)],
    ids=["while a batch is made", "while the queue is full", "idle"],
)
def test_the_workers_of_a_rank_that_is_killed_end_with_it(tmp_path: Path, num_bytes: int, seconds: float, begun: int) -> None:
    args = (tmp_path, num_bytes, seconds)
    assert not workers_left_by(start_two_workers, *args, when=lambda: count_files(tmp_path) == begun)


def test_a_blend_keeps_the_shares_and_repeats_the_shorter_set() -> None:
    short, long = PairList(make_pairs(6)), PairList(make_pairs(24, seed=8))
    parts = [PairCollection([store]) for store in (short, long)]  # type: ignore[list-item]
    blend = PairCollection.combine(parts, [0.5, 0.5])
    assert len(blend) == 48
    assert [blend.describe(index) for index in (0, 6, 23, 24, 47)] == [f"pair {n} of memory" for n in (0, 0, 5, 0, 23)]
    assert blend[25].chosen.tolist() == long[1].chosen.tolist()
    assert blend.lengths_of(np.array([7]))[0].tolist() == short.lengths[1].tolist()


def test_parts_of_splits_do_not_meet_in_a_blend() -> None:
    parts = [PairCollection([PairList(make_pairs(count))]).split(0.2) for count in (30, 10)]  # type: ignore[list-item]
    train = PairCollection.combine([first for first, _ in parts], [0.5, 0.5])
    held_out = PairCollection.combine([last for _, last in parts])
    assert (len(train), len(held_out)) == (48, 8)
    assert {train.describe(n) for n in range(24, 48)} == {f"pair {n} of memory" for n in range(8)}
    assert [held_out.describe(n) for n in range(8)] == [f"pair {n} of memory" for n in (*range(24, 30), 8, 9)]


def test_members_of_blends_and_splits_are_those_of_whole_arrays() -> None:
    stores: list[Any] = [PairList(make_pairs(count, seed=count)) for count in (6, 24, 1)]
    parts, arrays = [PairCollection([store]) for store in stores], [np.arange(6), np.arange(24), np.arange(1)]
    weights, starts = [0.3, 0.6, 0.1], [0, 6, 30]
    blend = PairCollection.combine(parts, weights)
    counts = [max(1, round(max(n / w for n, w in zip((6, 24, 1), weights, strict=True)) * w)) for w in weights]
    whole = np.concatenate([s + np.resize(a, c) for s, a, c in zip(starts, arrays, counts, strict=True)])
    found = [(blend, whole)]
    found += zip(blend.split(0.7), (whole[: -round(0.7 * len(whole))], whole[-round(0.7 * len(whole)) :]), strict=True)
    # A blend of what was blended and split: its members are several spans, over and over.
    twice = PairCollection.combine([found[2][0], parts[0]], [0.9, 0.1])
    found.append((twice, np.concatenate([np.resize(found[2][1], len(twice) - 6), 31 + np.arange(6)])))
    assert len(twice) == 60
    for pairs, members in found:
        assert pairs.members_of(np.arange(len(pairs))).tolist() == members.tolist()
        assert np.concatenate([part for _, part in pairs.all_members()]).tolist() == members.tolist()
        assert np.concatenate([part for _, part in pairs.all_members(7)]).tolist() == members[:7].tolist()
        distinct = pairs.distinct()
        assert distinct.members_of(np.arange(len(distinct))).tolist() == sorted(set(members.tolist()))
        order = np.random.default_rng(1).permutation(len(pairs))
        expected = [[part.size for part in (pair.prompt, pair.chosen, pair.rejected)] for pair in map(pairs.__getitem__, order)]
        assert pairs.lengths_of(order).tolist() == expected


def test_a_small_set_that_is_repeated_often_is_walked_in_few_pieces() -> None:
    pairs = PairCollection([PairList(make_pairs(5))], [Span(1, 3, 3 * ROWS_AT_A_TIME, begin=2)])  # type: ignore[list-item]
    pieces = list(pairs.all_members())
    assert [first for first, _ in pieces] == [0, ROWS_AT_A_TIME, 2 * ROWS_AT_A_TIME]
    assert np.concatenate([part for _, part in pieces]).tolist() == [3, 1, 2] * ROWS_AT_A_TIME


def test_a_split_holds_out_the_last_pairs() -> None:
    train, held_out = collection(make_pairs()).split(0.1)
    assert (len(train), len(held_out)) == (22, 2)
    assert held_out[0].prompt.tolist() == make_pairs()[22].prompt.tolist()
    assert held_out.lengths_of(np.arange(2)).shape == (2, 3)
