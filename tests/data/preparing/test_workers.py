from __future__ import annotations

import gc
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_rmipo.data.encoding.chat import load_template
from megatron_rmipo.data.encoding.encode import LengthPolicy, PairEncoder
from megatron_rmipo.data.encoding.tokenize import PreferenceTokenizer, load_tokenizer
from megatron_rmipo.data.layouts.reader import RowOptions
from megatron_rmipo.data.layouts.settle import settle_reading
from megatron_rmipo.data.preparing.workers import BatchEncoder, encode_batches
from megatron_rmipo.data.reading.rows import Turn
from megatron_rmipo.data.reading.sources import SourceRow
from tests.data.orphans import count_files, workers_left_by
from tests.data.pairs import pair_of


def encoder(tokenizer: PreferenceTokenizer) -> BatchEncoder:
    return BatchEncoder(tokenizer, load_template("hh", tokenizer), LengthPolicy(4096), RowOptions("strings", {}))


def row(number: int, **columns: object) -> SourceRow:
    return SourceRow("rows.jsonl", number, json.dumps(columns).encode())


@pytest.mark.parametrize("kind", ["byte_bpe", "pieces"])
def test_a_batch_holds_the_ids_of_its_pairs_one_behind_the_other(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: PreferenceTokenizer = request.getfixturevalue(kind)
    rows = [row(n, prompt=f"Why {n}?" * n, chosen=f"So {n}.", rejected="No." if n != 3 else 7) for n in range(1, 6)]
    batch = encoder(tokenizer)(rows)
    assert (batch.num_rows, batch.num_truncated, [reject.number for reject in batch.rejects]) == (5, 0, [3])
    single = PairEncoder(tokenizer, load_template("hh", tokenizer), LengthPolicy(4096))
    expected: list[int] = []
    for n, lengths in zip((1, 2, 4, 5), batch.lengths.tolist(), strict=True):
        (pair,) = single.encode([pair_of((Turn("user", f"Why {n}?" * n),), f"So {n}.", "No.")])
        assert lengths == [len(pair.prompt), len(pair.chosen), len(pair.rejected)]  # type: ignore[union-attr]
        expected += [*pair.prompt, *pair.chosen, *pair.rejected]  # type: ignore[union-attr]
    assert batch.tokens.dtype == batch.lengths.dtype == np.int32
    assert batch.tokens.tolist() == expected


def test_a_batch_without_a_pair_is_empty(pieces: PreferenceTokenizer) -> None:
    batch = encoder(pieces)([row(1, prompt="x")])
    assert (batch.tokens.shape, batch.lengths.shape, len(batch.rejects)) == ((0,), (0, 3), 1)


def test_numbers_beside_the_pairs_are_the_rows(pieces: PreferenceTokenizer) -> None:
    text = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    options = settle_reading([text], {}, form="strings")
    assert options.values == ()
    with_margins = settle_reading([text, {}, {**text, "margin": 0.5}], {}, form="strings")
    assert with_margins.values == ("margin",)
    rows = [row(1, **text, margin=0.25), row(2, **text), row(3, **text, margin=-1), row(4, margin=2.0)]
    template = load_template("hh", pieces)
    batch = BatchEncoder(pieces, template, LengthPolicy(4096), with_margins)(rows)
    assert (batch.values.dtype, batch.values.tolist()) == (np.float32, [[0.25], [-1.0]])
    assert len(batch.lengths) == 2
    (without, broken) = batch.rejects
    assert (without.number, without.reason, without.field) == (2, "missing_field", "margin")
    assert "the data set has a margin beside every pair" in without.message
    assert (broken.number, broken.field) == (4, "prompt")
    # Nor is one dropped that the first rows did not have.
    batch = BatchEncoder(pieces, template, LengthPolicy(4096), options)(rows[:2])
    assert batch.values.shape == (1, 0)
    assert [(reject.number, reject.reason) for reject in batch.rejects] == [(1, "mixed")]


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_afterwards_as_before(
    enabled: bool, pieces: PreferenceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    during: list[bool] = []
    batches = encoder(pieces)
    monkeypatch.setattr(batches, "_parse", lambda _row: during.append(gc.isenabled()))
    was_enabled = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(AttributeError):  # None, which the stand-in gives for a row, has no fault to list
            batches([row(1)])
        assert (during, gc.isenabled()) == ([False], enabled)
    finally:
        (gc.enable if was_enabled else gc.disable)()


def prepare_without_end(tokenizer_path: Path, folder: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_path))
    rows = (row(n, prompt="Why?", chosen="So.", rejected="No.") for n in itertools.count(1))
    options = RowOptions("strings", {})
    for _ in encode_batches(rows, tokenizer, load_template("hh", tokenizer), LengthPolicy(4096), options, workers=2):
        (folder / "begun").touch()


def test_the_workers_of_a_preparation_that_is_killed_end_with_it(sentencepiece_path: Path, tmp_path: Path) -> None:
    assert not workers_left_by(prepare_without_end, sentencepiece_path, tmp_path, when=lambda: count_files(tmp_path) == 1)
