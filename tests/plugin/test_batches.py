"""Micro-batches for loops that run a fixed number of them: which pairs, on which rank, in which order."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rmipo.data.batches.packing import PackedRow
from megatron_rmipo.data.batches.padding import PaddedRows
from megatron_rmipo.data.store.collection import open_pairs
from megatron_rmipo.data.store.manifest import Manifest, TokenizerInfo
from megatron_rmipo.data.store.pair_store import PairStoreWriter, TokenizedPair
from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.plugin.batches import Microbatch, PreferenceBatches, preference_batches
from megatron_rmipo.plugin.dataset import PreferenceDataset
from tests.integration.problem import BOS, VOCAB, collection, make_pairs

LAYOUTS: dict[str, dict[str, Any]] = {"packed": {}, "padded": {"layout": "padded", "vocab_size": VOCAB}}


def make(objective: str = "rmipo", rank: int = 0, ranks: int = 1, **settings: Any) -> PreferenceBatches:
    groups: Any = types.SimpleNamespace(dp_rank=rank, dp_size=ranks, ep=types.SimpleNamespace(size=lambda: 1))
    defaults = {"global_batch_size": 7, "num_microbatches": 3, "total_pairs": 50, "context_token_id": BOS, "groups": groups}
    return preference_batches(collection(make_pairs()), build_objective(objective, {}), **{**defaults, **settings})


def tokens_of(microbatches: list[Microbatch]) -> list[list[int]]:
    return [one.row.token_ids.flatten().tolist() for one in microbatches]


def pairs_of(microbatches: list[Microbatch]) -> list[list[int]]:
    """Of each micro-batch its pairs, as indices of the data."""
    numbers = [one.row.pair_numbers[one.row.branches == 0].unique().tolist() for one in microbatches]
    return [
        [int(one.batch.pair_indices[number]) for number in own if number >= 0]
        for one, own in zip(microbatches, numbers, strict=True)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_goes_on_sees_what_it_would_have_seen(layout: str) -> None:
    whole = make(**LAYOUTS[layout])
    seen = list(whole)
    assert whole.consumed_pairs == 50
    assert len(seen) == 3 * -(-50 // 7)
    first = make(**LAYOUTS[layout])
    taken = list(itertools.islice(first, 3 * 3))
    assert first.consumed_pairs == 21
    again = make(consumed_pairs=first.consumed_pairs, num_workers=2, **LAYOUTS[layout])
    assert tokens_of(taken) + tokens_of(list(again)) == tokens_of(seen)


def test_a_run_of_before_goes_on_in_its_order() -> None:
    whole = make(order="permuted")
    seen = pairs_of(list(whole))
    assert (whole.order, make().order) == ("permuted", "keyed")
    assert seen != pairs_of(list(make()))
    assert sorted(n for pack in seen[:3] for n in pack) == sorted(np.random.default_rng((1234, 0)).permutation(24)[:7].tolist())
    assert pairs_of(list(make(order=whole.order, consumed_pairs=21))) == seen[9:]
    with pytest.raises(ConfigError, match="order 'by length': it is 'keyed' or 'permuted'"):
        make(order="by length")


def test_what_is_not_taken_to_its_end_was_not_consumed() -> None:
    batches = make()
    next(batches)
    next(batches)
    assert batches.consumed_pairs == 0
    next(batches)
    assert batches.consumed_pairs == 7


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_share_every_pair_once(layout: str, ranks: int) -> None:
    of_ranks = [pairs_of(list(make(rank=rank, ranks=ranks, **LAYOUTS[layout]))) for rank in range(ranks)]
    assert {len(one) for one in of_ranks} == {3 * 8}
    for step in range(8):
        own = [number for one in of_ranks for pack in one[3 * step : 3 * step + 3] for number in pack]
        assert len(own) == (7 if step < 7 else 1)
    # Two epochs of 24 and two pairs more.
    counts = np.bincount([number for one in of_ranks for pack in one for number in pack], minlength=24)
    assert sorted(counts.tolist()) == [2] * 22 + [3] * 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_of_few_pairs_are_filled_up_with_what_does_not_count(layout: str) -> None:
    microbatches = list(make(global_batch_size=2, total_pairs=2, num_microbatches=4, **LAYOUTS[layout]))
    assert len(microbatches) == 4
    assert sorted(len(pack) for pack in pairs_of(microbatches)) == [0, 0, 1, 1]
    assert all(one.row.num_tokens for one in microbatches)


def test_peek_takes_nothing() -> None:
    batches = make()
    assert batches.peek() is batches.peek()
    first = next(batches)
    assert first.batch is batches.peek()
    next(batches), next(batches)
    assert batches.peek() is not first.batch
    assert batches.consumed_pairs == 7
    short = make(total_pairs=7)
    list(short)
    with pytest.raises(StopIteration):
        short.peek()


@pytest.mark.parametrize(
    ("settings", "shapes"),
    [
        ({"pad_to": 600}, {(600,)}),
        ({"pad_to": 110, "unconditional": "pass"}, {(110,)}),
        ({**LAYOUTS["padded"], "pad_to": 36}, {(2 * 2 * 3, 36)}),
        ({**LAYOUTS["padded"], "pad_to": 36, "unconditional": "pass"}, {(2 * 3, 36)}),
    ],
    ids=["packed", "packed, in a pass", "padded", "padded, in a pass"],
)
def test_one_shape_for_pipelines_without_variable_lengths(settings: dict[str, Any], shapes: set[tuple[int, ...]]) -> None:
    microbatches = list(make(**settings))
    assert {tuple(one.row.token_ids.shape) for one in microbatches} == shapes
    lengths = {row.token_ids.shape[-1] for one in microbatches for row in one.batch.rows}
    assert lengths == {shape[-1] for shape in shapes}


def test_padded_rows_of_a_micro_batch_are_as_long_as_its_longest() -> None:
    lengths = {one.row.token_ids.shape[1] for one in make(multiple_of=2, **LAYOUTS["padded"])}
    assert len(lengths) > 3
    assert all(length % 2 == 0 for length in lengths)


def test_chunks_of_an_interleaved_pipeline_run_the_same_micro_batches() -> None:
    whole = list(make())
    batches = make()
    first, second = batches.chunks(2)
    seen: tuple[list[Microbatch], list[Microbatch]] = ([], [])
    for step in range(8):
        # Chunk by chunk in groups, as the schedule does it, and never evenly.
        for chunk, iterator in ((0, first), (1, second), (0, first)):
            seen[chunk].extend(itertools.islice(iterator, {0: 2, 1: 3}[chunk] if len(seen[chunk]) % 3 == 0 else 1))
        assert batches.consumed_pairs == min(7 * (step + 1), 50)
    assert [id(one.batch) for one in seen[0]] == [id(one.batch) for one in seen[1]]
    assert tokens_of(seen[0]) == tokens_of(seen[1]) == tokens_of(whole)


def test_responses_alone_stand_in_the_rows_or_in_a_pass() -> None:
    for settings, kind in ((LAYOUTS["packed"], PackedRow), (LAYOUTS["padded"], PaddedRows)):
        in_rows, apart = make(**settings).peek(), make(unconditional="pass", **settings).peek()
        assert all(isinstance(row, kind) for row in in_rows.rows + apart.rows)
        assert not in_rows.unconditional
        assert [row.num_alone for row in in_rows.conditional] == [row.num_responses // 2 for row in in_rows.conditional]
        assert apart.unconditional
        assert {row.num_alone for row in apart.rows} == {0}
        assert torch.equal(
            torch.cat([row.lengths[row.num_alone :] for row in in_rows.conditional]).sort()[0],
            torch.cat([row.lengths for row in apart.unconditional]).sort()[0],
        )


@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        ("rmipo", {"tokens_per_microbatch": 40}, "^tokens_per_microbatch 40: pair .* of memory needs"),
        ("rmipo", {"tokens_per_microbatch": 76}, "3 micro-batches of at most 76 tokens .* hold 228 tokens, and 7 pairs take"),
        ("rmipo", {"layout": "padded"}, "vocab_size"),
        ("rmipo", {**LAYOUTS["padded"], "tokens_per_microbatch": 90}, "tokens_per_microbatch 90 says nothing of padded"),
        ("rmipo", {**LAYOUTS["padded"], "pad_to": 20}, "pad_to 20: pair"),
        ("rmipo", {"pad_to": 90, "tokens_per_microbatch": 80}, "tokens_per_microbatch 80 says nothing of rows of pad_to 90"),
        ("rmipo", {"pad_to": 90, "multiple_of": 4}, "pad_to 90 is no multiple of multiple_of 4"),
        ("rmipo", LAYOUTS["padded"] | {"layout": "packed"}, f"vocab_size {VOCAB} says nothing of packed rows"),
        ("epsilon_dpo", LAYOUTS["padded"], "objective epsilon_dpo mixes"),
        ("dpo", {}, "objective dpo compares with a reference"),
        ("rmipo", {"layout": "paded"}, "layout 'paded': it is 'packed' or 'padded'"),
        ("rmipo", {"unconditional": "row"}, "unconditional 'row': it is 'rows' or 'pass'"),
        ("rmipo", {"global_batch_size": 0}, "global_batch_size 0: it is at least 1"),
        ("rmipo", {"num_microbatches": 0}, "num_microbatches 0: it is at least 1"),
        ("rmipo", {"consumed_pairs": -7}, "consumed_pairs -7: it is at least 0"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(objective: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(objective, **settings)


def test_passes_before_a_step_are_cut_as_the_step_is() -> None:
    pairs = collection(make_pairs())
    pairs.reference_scores = [np.zeros((24, 2), dtype=np.float32)]
    groups: Any = types.SimpleNamespace(dp_rank=0, dp_size=1, ep=types.SimpleNamespace(size=lambda: 1))
    for name in ("rmipo", "kto"):
        batches = preference_batches(
            pairs, build_objective(name, {}), global_batch_size=24, num_microbatches=5, context_token_id=BOS,
            unconditional="pass", groups=groups,
        )  # fmt: skip
        batch = batches.peek()
        before = batch.unconditional or batch.mismatched
        assert len(before) == len(batch.conditional) == 5
        assert sorted(torch.cat([row.pair_numbers[::2] for row in before]).tolist()) == list(range(24))


def test_a_mismatched_pair_that_fits_no_row_is_refused() -> None:
    # Rows of 10, 9 and 10 tokens; the first prompt with the second one's responses takes 14.
    sizes = [(6, 3, 3), (1, 5, 5), (1, 10, 1)]
    pairs = collection([TokenizedPair(*(np.arange(size) + number for size in own)) for number, own in enumerate(sizes)])
    pairs.reference_scores = [np.zeros((3, 2), dtype=np.float32)]
    groups: Any = types.SimpleNamespace(dp_rank=0, dp_size=1, ep=types.SimpleNamespace(size=lambda: 1))
    start = functools.partial(preference_batches, pairs, global_batch_size=3, num_microbatches=3, groups=groups)
    start(build_objective("dpo", {}), tokens_per_microbatch=10)
    with pytest.raises(ConfigError, match="pair 0 of memory, its prompt with the responses of another, needs 14 tokens"):
        start(build_objective("kto", {}), tokens_per_microbatch=10)


def test_data_without_what_the_objective_reads_is_refused(tmp_path: Path) -> None:
    with PairStoreWriter(tmp_path / "alone", vocab_size=VOCAB) as writer:
        writer.add(dataclasses.replace(make_pairs()[0], rejected=np.array([], dtype=np.int64)))
        writer.finalize(Manifest(tokenizer=TokenizerInfo("random ids", VOCAB, BOS, 2), has_rejected=False))
    groups: Any = types.SimpleNamespace(dp_rank=0, dp_size=1, ep=types.SimpleNamespace(size=lambda: 1))
    start = functools.partial(preference_batches, global_batch_size=1, num_microbatches=1, context_token_id=BOS, groups=groups)
    with pytest.raises(DataError, match=r"alone: supervised data, without rejected responses, which objective rmipo needs"):
        start(str(tmp_path / "alone"), build_objective("rmipo", {}))
    with pytest.raises(DataError, match="pair 1 of the pairs in memory lacks a response that objective rmipo reads"):
        start([([1], [2], [3]), ([1], [2], [])], build_objective("rmipo", {}))
    with pytest.raises(DataError, match="objective dpo reads margin beside each pair, and the pairs in memory have no such"):
        start([([1], [2], [3])], build_objective("dpo", {"pair_margin": True}))
    for data in (str(tmp_path / "alone"), [([1], [2], [])]):
        assert len(start(data, build_objective("sft", {})).peek().conditional) == 1


def test_what_is_no_objective_is_refused() -> None:
    for wrong in ("rmipo", type(build_objective("rmipo", {}))):
        groups: Any = types.SimpleNamespace(dp_rank=0, dp_size=1)
        fed = functools.partial(preference_batches, global_batch_size=1, num_microbatches=1, groups=groups)
        for take in (fed, PreferenceDataset):
            with pytest.raises(ConfigError, match=r"objective .*: an Objective is expected, as build_objective\("):
                take([([1], [2], [3])], wrong)  # type: ignore[arg-type]


def test_a_step_whose_pairs_do_not_fit_says_so_on_every_rank() -> None:
    with pytest.raises(ConfigError, match=r"hold the \d+ pairs of a step"):
        list(make(tokens_per_microbatch=95, total_pairs=400))
    told = set()
    for rank in range(3):
        with pytest.raises(ConfigError, match=r"pairs of a step on data-parallel rank \d") as caught:
            list(make(rank=rank, ranks=3, tokens_per_microbatch=85, num_microbatches=1, global_batch_size=5, total_pairs=4000))
        told.add(str(caught.value))
    assert len(told) == 1


CHOSEN, REJECTED, PAIR = ([1], [3, 4], []), ([1, 6], [], [7]), ([1, 9], [5], [8])


@pytest.mark.parametrize(
    ("objective", "data", "message"),
    [
        ("simpo", [PAIR, CHOSEN], "pair 1 of the pairs in memory lacks a response that objective simpo reads"),
        ("sft", [CHOSEN, REJECTED], "pair 1 of the pairs in memory lacks a response that objective sft reads"),
        ("kto", [CHOSEN, REJECTED, PAIR], "to be pairs, or rows of one response each of both kinds"),
        ("kto", [CHOSEN, CHOSEN], "to be pairs, or rows of one response each of both kinds"),
        ("rmipo:1,kto:1", [CHOSEN, REJECTED], "pair 0 of the pairs in memory lacks a response"),
    ],
)
def test_responses_that_an_objective_reads_are_there_or_refused(objective: str, data: list[Any], message: str) -> None:
    def begin(data: list[Any]) -> PreferenceBatches:
        pairs = open_pairs(data)
        pairs.reference_scores = [np.zeros((len(data), 2), dtype=np.float32)]
        groups: Any = types.SimpleNamespace(dp_rank=0, dp_size=1, ep=types.SimpleNamespace(size=lambda: 1))
        settings: dict[str, Any] = {"global_batch_size": 2, "num_microbatches": 1, "context_token_id": BOS, "groups": groups}
        return preference_batches(pairs, build_objective(objective, {}), **settings)

    with pytest.raises(DataError, match=message):
        begin(data)
    whole = [PAIR, ([1, 2], [3], [4])]
    begin({"kto": [CHOSEN, REJECTED], "sft": [CHOSEN, PAIR]}.get(objective, whole)).peek()
