from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib
import itertools
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_rmipo.data.store.collection import PairCollection, Span
from megatron_rmipo.data.store.fingerprint import collection_fingerprint, content_facts
from megatron_rmipo.data.store.pair_store import Manifest, PairStore, PairStoreWriter, TokenizedPair, TokenizerInfo
from megatron_rmipo.errors import DataError

INFO = TokenizerInfo("f" * 64, 1003, 1, None)


def make_pairs(count: int, vocab_size: int, seed: int = 0) -> list[TokenizedPair]:
    rng = np.random.default_rng(seed)
    return [TokenizedPair(*(rng.integers(0, vocab_size, rng.integers(1, 40)) for _ in range(3))) for _ in range(count)]


EMPTY = np.empty(0, dtype=np.int64)


def make_unpaired(count: int, vocab_size: int = 1003) -> list[TokenizedPair]:
    """Rows with one response, the second of every three desirable."""
    pairs = make_pairs(count, vocab_size)
    return [
        dataclasses.replace(pair, rejected=EMPTY) if number % 3 == 1 else dataclasses.replace(pair, chosen=EMPTY)
        for number, pair in enumerate(pairs)
    ]


def write(
    prefix: Path, pairs: list[TokenizedPair], vocab_size: int = 1003, *, unpaired: bool = False, overwrite: bool = False
) -> Manifest:
    with PairStoreWriter(prefix, vocab_size, unpaired=unpaired, overwrite=overwrite) as writer:
        for pair in pairs:
            writer.add(pair)
        return writer.finalize(Manifest(dataclasses.replace(INFO, vocab_size=vocab_size), counts={"rows": len(pairs)}))


def same(a: TokenizedPair, b: TokenizedPair) -> bool:
    return all(np.array_equal(getattr(a, part), getattr(b, part)) for part in ("prompt", "chosen", "rejected"))


@pytest.mark.parametrize("vocab_size", [1003, 65_499, 65_500, 128_256])
def test_what_is_written_is_read(tmp_path: Path, vocab_size: int) -> None:
    pairs = make_pairs(23, vocab_size)
    pairs[7] = dataclasses.replace(pairs[7], chosen=np.array([vocab_size - 1]))
    manifest = write(tmp_path / "new" / "pairs", pairs, vocab_size)
    store = PairStore(tmp_path / "new" / "pairs")
    assert len(store) == 23
    assert store.manifest == manifest
    assert store.lengths.dtype == np.int32
    for index, pair in enumerate(pairs):
        assert same(store[index], pair)
        assert store[index].prompt.dtype == np.int64
        assert store.lengths[index].tolist() == [len(pair.prompt), len(pair.chosen), len(pair.rejected)]
    assert same(store[-1], pairs[-1])
    with pytest.raises(IndexError):
        store[23]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["pairs.bin", "pairs.idx", "pairs.json"]


@pytest.mark.parametrize(("first", "expected"), [([7, 7, 7, 7, 7], 7), ([7, 7, 7, 7, 8], None), ([8, 7, 7, 7, 7], None)])
def test_the_token_that_begins_every_prompt_is_noted(tmp_path: Path, first: list[int], expected: int | None) -> None:
    pairs = [
        dataclasses.replace(pair, prompt=np.array([token, *pair.prompt]))
        for token, pair in zip(first, make_pairs(5, 1003), strict=True)
    ]
    with PairStoreWriter(tmp_path / "pairs", 1003) as writer:
        for part in (pairs[:1], pairs[1:]):
            triples = [[pair.prompt, pair.chosen, pair.rejected] for pair in part]
            writer.add_all(
                np.concatenate([ids for triple in triples for ids in triple]),
                np.array([[len(ids) for ids in triple] for triple in triples]),
            )
        writer.finalize(Manifest(INFO))
    assert PairStore(tmp_path / "pairs").manifest.first_token_id == expected


@pytest.mark.parametrize("cuts", [(0, 11), (0, 0, 3, 4, 11), (0, 7, 7, 11)])
@pytest.mark.parametrize("kind", ["pairs", "supervised", "unpaired"])
def test_many_at_once_make_the_files_of_one_by_one(tmp_path: Path, kind: str, cuts: tuple[int, ...]) -> None:
    pairs = make_unpaired(11) if kind == "unpaired" else make_pairs(11, 1003)
    if kind == "supervised":
        pairs = [dataclasses.replace(pair, rejected=EMPTY) for pair in pairs]
    write(tmp_path / "one", pairs, unpaired=kind == "unpaired")
    with PairStoreWriter(tmp_path / "many", 1003, unpaired=kind == "unpaired") as writer:
        for first, end in itertools.pairwise(cuts):
            parts = [[pair.prompt, pair.chosen, pair.rejected] for pair in pairs[first:end]]
            tokens = np.concatenate([EMPTY, *(ids for triple in parts for ids in triple)]).astype(np.int32)
            writer.add_all(tokens, np.array([[len(ids) for ids in triple] for triple in parts]).reshape(-1, 3))
            assert len(writer) == end
        writer.finalize(Manifest(INFO, counts={"rows": 11}))
    for ending in ("bin", "idx", "json"):
        assert (tmp_path / f"many.{ending}").read_bytes() == (tmp_path / f"one.{ending}").read_bytes()


@pytest.mark.parametrize(
    ("unpaired", "lengths"),
    [
        (False, [[1, 2, 3], [0, 3, 3]]),
        (False, [[1, 2, 3], [3, 0, 3]]),
        (False, [[1, 2, 3], [3, 3, 0]]),
        (False, [[1, 2, 3], [3, 2, 2]]),
        (False, [[1, 2, 3], [7, 2, -3]]),
        (True, [[1, 2, 0], [3, 3, 3]]),
        (True, [[1, 2, 0], [9, 0, 0]]),
    ],
)
def test_the_last_of_many_is_checked_like_the_first(tmp_path: Path, unpaired: bool, lengths: list[list[int]]) -> None:
    with PairStoreWriter(tmp_path / "pairs", 1003, unpaired=unpaired) as writer, pytest.raises(AssertionError):
        writer.add_all(np.ones(12, dtype=np.int32), np.array(lengths))


def test_many_stay_of_the_kind_of_those_before(tmp_path: Path) -> None:
    with PairStoreWriter(tmp_path / "pairs", 1003) as writer:
        writer.add_all(np.ones(5, dtype=np.int32), np.array([[1, 2, 2]]))
        with pytest.raises(AssertionError, match="pairs and supervised rows"):
            writer.add_all(np.ones(6, dtype=np.int32), np.array([[1, 2, 0], [1, 2, 0]]))


def test_megatron_reads_it_as_documents_of_three_sequences(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    pairs = make_pairs(5, 1003)
    write(tmp_path / "pairs", pairs)
    data = IndexedDataset(str(tmp_path / "pairs"))
    assert data.document_indices.tolist() == [0, 3, 6, 9, 12, 15]
    assert np.array_equal(data[3 * 2 + 1], pairs[2].chosen)


@pytest.mark.parametrize("vocab_size", [1003, 128_256])
def test_supervised_data_have_an_empty_rejected_sequence(tmp_path: Path, vocab_size: int) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    pairs = [dataclasses.replace(pair, rejected=np.empty(0, dtype=np.int64)) for pair in make_pairs(7, vocab_size)]
    write(tmp_path / "rows", pairs, vocab_size)
    store = PairStore(tmp_path / "rows")
    assert store.manifest.has_rejected is False
    assert set(store.manifest.lengths) == {"prompt", "chosen", "total"}
    assert store.lengths[:, 2].tolist() == [0] * 7
    for index, pair in enumerate(pairs):  # the last one's empty sequence starts at the end of the file
        assert same(store[index], pair)
        assert (store[index].rejected.dtype, store[index].rejected.shape) == (np.int64, (0,))
    data = IndexedDataset(str(tmp_path / "rows"))
    assert data.sequence_lengths.tolist() == [length for row in store.lengths.tolist() for length in row]
    assert [len(data[3 * index + 2]) for index in range(7)] == [0] * 7
    assert np.array_equal(data[3 * 6 + 1], pairs[6].chosen)


@pytest.mark.parametrize("vocab_size", [1003, 128_256])
def test_unpaired_rows_have_one_response_each(tmp_path: Path, vocab_size: int) -> None:
    rows = make_unpaired(9, vocab_size)
    manifest = write(tmp_path / "rows", rows, vocab_size, unpaired=True)
    store = PairStore(tmp_path / "rows")
    assert store.manifest == manifest
    assert (manifest.unpaired, manifest.has_rejected, manifest.kind, manifest.num_pairs) == (True, True, "unpaired rows", 9)
    assert manifest.counts == {"rows": 9, "desirable": 3, "undesirable": 6}
    for index, row in enumerate(rows):
        assert same(store[index], row)
        assert store.lengths[index].tolist() == [row.prompt.size, row.chosen.size, row.rejected.size]
        assert (store.lengths[index, 1] > 0) == (index % 3 == 1)
    assert {part.dtype for part in (store[0].chosen, store[1].rejected)} == {np.dtype(np.int64)}
    # A response counts where there is one: the 0 of the others is no length.
    assert manifest.lengths["chosen"]["mean"] == round(np.mean([rows[index].chosen.size for index in (1, 4, 7)]), 2)
    assert manifest.lengths["rejected"]["p5"] > 0
    assert manifest.lengths["total"]["max"] == max(row.prompt.size + row.chosen.size + row.rejected.size for row in rows)


@pytest.mark.parametrize(("side", "counts"), [("chosen", (0, 4)), ("rejected", (4, 0))])
def test_unpaired_rows_may_all_have_one_label(side: str, counts: tuple[int, int], tmp_path: Path) -> None:
    rows = [dataclasses.replace(pair, **{side: EMPTY}) for pair in make_pairs(4, 1003)]
    write(tmp_path / "rows", rows, unpaired=True)
    manifest = PairStore(tmp_path / "rows").manifest
    assert (manifest.counts["desirable"], manifest.counts["undesirable"]) == counts
    assert (manifest.unpaired, manifest.has_rejected) == (True, True)
    assert side not in manifest.lengths


def test_a_row_with_two_responses_or_none_is_not_unpaired(tmp_path: Path) -> None:
    pair = make_pairs(1, 1003)[0]
    for wrong in (pair, dataclasses.replace(pair, chosen=EMPTY, rejected=EMPTY)):
        with pytest.raises(AssertionError, match="an unpaired row has one response"):
            write(tmp_path / "rows", [*make_unpaired(2), wrong], unpaired=True)
    with pytest.raises(AssertionError, match=r"\[\d+, 0, \d+\]"):
        write(tmp_path / "rows", make_unpaired(1))


def test_a_manifest_that_denies_its_unpaired_rows_is_refused(tmp_path: Path) -> None:
    rows = make_unpaired(3)
    write(tmp_path / "rows", rows, unpaired=True)
    edit_manifest(tmp_path / "rows", unpaired=False)
    with pytest.raises(
        DataError,
        match=rf"rows\.json: holds pairs, but by rows\.idx row 0 has 0 chosen and {rows[0].rejected.size} rejected tokens",
    ):
        PairStore(tmp_path / "rows")
    edit_manifest(tmp_path / "rows", unpaired=True)
    assert len(PairStore(tmp_path / "rows")) == 3
    pairs = make_pairs(2, 1003)
    write(tmp_path / "pairs", pairs)
    edit_manifest(tmp_path / "pairs", unpaired=True)
    with pytest.raises(DataError, match=rf"holds unpaired rows, but by pairs\.idx row 0 has {pairs[0].chosen.size} chosen and"):
        PairStore(tmp_path / "pairs")


def test_an_index_that_its_manifest_vouches_for_is_looked_at(tmp_path: Path) -> None:
    write(tmp_path / "rows", make_pairs(5, 1003))
    index = tmp_path / "rows.idx"
    content = bytearray(index.read_bytes())
    lengths = np.frombuffer(content, dtype=np.int32, count=15, offset=34).reshape(5, 3)
    # As many tokens in all, none of them of the prompt.
    lengths[3] = [0, lengths[3, 0] + lengths[3, 1], lengths[3, 2]]
    index.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.idx row 3 has \d+ chosen and \d+ rejected tokens behind 0 of a prompt"):
        PairStore(tmp_path / "rows")
    index.write_bytes(content[:100])
    edit_manifest(tmp_path / "rows", file_bytes={"bin": (tmp_path / "rows.bin").stat().st_size, "idx": 100})
    with pytest.raises(DataError, match="not a Megatron index of 5 pairs of three sequences"):
        PairStore(tmp_path / "rows")


def test_pairs_and_supervised_rows_do_not_mix(tmp_path: Path) -> None:
    first, second = make_pairs(2, 1003)
    with pytest.raises(AssertionError, match="pairs and supervised rows"):
        write(tmp_path / "rows", [first, dataclasses.replace(second, rejected=np.empty(0, dtype=np.int64))])
    write(tmp_path / "rows", [first, second])
    edit_manifest(tmp_path / "rows", has_rejected=False)
    with pytest.raises(
        DataError, match=r"rows\.json: holds supervised rows, but by rows\.idx row 0 has \d+ chosen and \d+ rejected tokens"
    ):
        PairStore(tmp_path / "rows")


def test_a_manifest_without_the_fields_holds_pairs(tmp_path: Path) -> None:
    write(tmp_path / "pairs", make_pairs(2, 1003))
    path = tmp_path / "pairs.json"
    fields = json.loads(path.read_text())
    assert (fields.pop("has_rejected"), fields.pop("unpaired")) == (True, False)
    path.write_text(json.dumps(fields))
    manifest = PairStore(tmp_path / "pairs").manifest
    assert (manifest.has_rejected, manifest.unpaired, manifest.kind) == (True, False, "pairs")


def test_the_manifest_counts(tmp_path: Path) -> None:
    manifest = write(tmp_path / "pairs", make_pairs(1, 1003) * 3 + make_pairs(1, 1003, seed=4))
    store = PairStore(tmp_path / "pairs")
    total = store.lengths[:, 0] + store.lengths[:, 1:].max(axis=1)
    assert manifest.num_pairs == 4
    assert manifest.num_tokens == store.lengths.sum()
    assert manifest.lengths["total"]["max"] == total.max()
    assert manifest.lengths["chosen"]["p50"] == np.percentile(store.lengths[:, 1], 50)
    assert manifest.counts == {"rows": 4}


def test_a_store_travels_to_loader_processes(tmp_path: Path) -> None:
    pairs = make_pairs(3, 1003)
    write(tmp_path / "pairs", pairs)
    payload = pickle.dumps(PairStore(tmp_path / "pairs"))
    assert len(payload) < 500
    assert same(pickle.loads(payload)[1], pairs[1])


def test_an_interrupted_run_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    def interrupted() -> None:
        with PairStoreWriter(tmp_path / "pairs", 1003) as writer:
            writer.add(make_pairs(1, 1003)[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    killed = PairStoreWriter(tmp_path / "pairs", 1003)
    killed.add(make_pairs(1, 1003)[0])
    killed._builder.data_file.close()
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.incomplete.bin"]
    with pytest.raises(DataError, match=r"pairs\.json: not found"):
        PairStore(tmp_path / "pairs")
    write(tmp_path / "pairs", make_pairs(2, 1003))
    assert len(PairStore(tmp_path / "pairs")) == 2


def test_replacing_takes_a_word(tmp_path: Path) -> None:
    write(tmp_path / "pairs", make_pairs(2, 1003))
    with pytest.raises(DataError, match=r"pairs\.bin, pairs\.idx, pairs\.json already there\. Pass --overwrite"):
        write(tmp_path / "pairs", make_pairs(3, 1003))
    assert len(PairStore(tmp_path / "pairs")) == 2
    write(tmp_path / "pairs", make_pairs(3, 1003), overwrite=True)
    assert len(PairStore(tmp_path / "pairs")) == 3


def test_a_full_disk_keeps_the_earlier_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "pairs", make_pairs(2, 1003))

    def full(*_args: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DataError, match=r"could not be written \(No space left on device\)"):
        write(tmp_path / "pairs", make_pairs(3, 1003), overwrite=True)
    assert len(PairStore(tmp_path / "pairs")) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.bin", "pairs.idx", "pairs.json"]


def test_an_interrupted_replacement_does_not_pass_for_the_earlier_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "pairs", make_pairs(2, 1003))
    replace = os.replace

    def stop_at_the_index(source: Path, target: Path) -> None:
        if target.suffix == ".idx":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop_at_the_index)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "pairs", make_pairs(3, 1003), overwrite=True)
    with pytest.raises(DataError, match=r"pairs\.json: not found"):
        PairStore(tmp_path / "pairs")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "Free some space, or choose another --output-prefix"),
        (errno.EDQUOT, "Free some space"),
        (errno.EACCES, "writable for this user, or choose another --output-prefix"),
        (errno.EROFS, "writable for this user"),
        (errno.ENOENT, "directory). Choose another --output-prefix"),
    ],
)
def test_the_remedy_fits_the_failure(number: int, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(DataError, match=re.escape(remedy)):
        PairStoreWriter(tmp_path / "pairs", 1003)


@pytest.mark.parametrize("prefix", ["", "out/", ".", "a/.."])
def test_a_folder_is_no_prefix(prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="a folder, not the beginning of file names"):
        PairStoreWriter(prefix, 1003)
    assert list(tmp_path.iterdir()) == []


def test_no_pairs_are_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pairs"):
        write(tmp_path / "pairs", [])
    assert list(tmp_path.iterdir()) == []


def edit_manifest(prefix: Path, **changes: object) -> None:
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    prefix = tmp_path / "pairs"

    def damaged(message: str) -> None:
        with pytest.raises(DataError, match=message):
            PairStore(prefix)
        write(prefix, make_pairs(4, 1003), overwrite=True)

    write(prefix, make_pairs(4, 1003))
    Path(f"{prefix}.bin").unlink()
    damaged(r"pairs\.bin: missing, though pairs\.json is there")
    whole = Path(f"{prefix}.bin").read_bytes()
    Path(f"{prefix}.bin").write_bytes(whole[:-2])
    damaged(r"pairs\.bin: \d+ bytes, but pairs\.json says \d+: truncated")
    Path(f"{prefix}.idx").write_bytes(b"\0" * Path(f"{prefix}.idx").stat().st_size)
    damaged(r"pairs\.idx: not a Megatron index of 4 pairs")
    write(tmp_path / "other", make_pairs(4, 1003, seed=9))
    Path(f"{prefix}.idx").write_bytes((tmp_path / "other.idx").read_bytes())
    damaged(r"pairs\.idx: does not describe 4 pairs")
    edit_manifest(prefix, num_pairs=3)
    damaged(r"pairs\.idx: not a Megatron index of 3 pairs")
    edit_manifest(prefix, version=0)
    damaged(r"pairs\.json: version 0, this code reads 1")
    Path(f"{prefix}.json").write_text("{")
    damaged(r"pairs\.json: not a readable manifest")
    Path(f"{prefix}.json").write_text('{"version": 1}')
    damaged(r"pairs\.json: not a manifest of preference pairs")
    edit_manifest(prefix, surprise=1)
    damaged(r"pairs\.json: not a manifest of preference pairs")


def test_the_import_path_that_was_documented_first_still_leads_here() -> None:
    assert importlib.import_module("megatron_rmipo.data.pair_store").PairStore is PairStore


def write_with_values(prefix: Path, values: np.ndarray, columns: list[str], *, overwrite: bool = False) -> Manifest:
    pairs = make_pairs(len(values), 1003)
    with PairStoreWriter(prefix, 1003, columns=columns, overwrite=overwrite) as writer:
        for pair, beside in zip(pairs, values.tolist(), strict=True):
            writer.add(pair, beside)
        return writer.finalize(Manifest(INFO))


def test_numbers_beside_the_pairs_are_kept_with_them(tmp_path: Path) -> None:
    values = np.random.default_rng(3).normal(size=(7, 2)).astype(np.float32)
    manifest = write_with_values(tmp_path / "pairs", values, ["margin", "weight"])
    store = pickle.loads(pickle.dumps(PairStore(tmp_path / "pairs")))
    assert manifest.pair_columns == store.manifest.pair_columns == ["margin", "weight"]
    assert isinstance(store.values, np.memmap)
    assert store.values.tolist() == values.tolist()
    assert manifest.file_bytes["values"] == (tmp_path / "pairs.values.npy").stat().st_size
    # Which pairs of which data set, repeated ones too; a blend has the columns in any order.
    write_with_values(tmp_path / "other", values[:3, ::-1], ["weight", "margin"])
    both = PairCollection([store, PairStore(tmp_path / "other")], [Span(2, 1, 1), Span(7, 3, 2), Span(9, 1, 2)])
    found = both.values_of(np.array([1, 4, 0]), ("weight",))
    assert {name: column.tolist() for name, column in found.items()} == {"weight": values[[0, 2, 2], 1].tolist()}
    assert found["weight"].dtype == np.float32
    assert both.values_of(np.array([1, 3]), ()) == {}
    # Data that differ in them alone are other data.
    prints = [collection_fingerprint(PairCollection([store]))]
    write_with_values(tmp_path / "pairs", values + 1, ["margin", "weight"], overwrite=True)
    prints.append(collection_fingerprint(PairCollection([PairStore(tmp_path / "pairs")])))
    write(tmp_path / "pairs", make_pairs(7, 1003), overwrite=True)
    prints.append(collection_fingerprint(PairCollection([PairStore(tmp_path / "pairs")])))
    assert len(set(prints)) == 3
    # What has none leaves no file of the data set it replaced.
    assert sorted(path.name for path in tmp_path.glob("pairs.*")) == ["pairs.bin", "pairs.idx", "pairs.json"]
    assert PairStore(tmp_path / "pairs").values.shape == (7, 0)


@pytest.mark.parametrize(
    ("damage", "words"), [("missing", "missing, though"), ("short", "truncated"), ("other", "float32 (7, 1)")]
)
def test_damaged_numbers_beside_the_pairs_are_refused(tmp_path: Path, damage: str, words: str) -> None:
    write_with_values(tmp_path / "pairs", np.ones((7, 1), dtype=np.float32), ["margin"])
    path = tmp_path / "pairs.values.npy"
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        np.save(path, np.ones((7, 1), dtype=np.int32))
    with pytest.raises(DataError, match=re.escape(words)):
        PairStore(tmp_path / "pairs")


@pytest.mark.parametrize("values", [[[1.0]], [[1.0, 2.0, 3.0]], [[1.0, float("nan")]]])
def test_numbers_that_do_not_fit_are_our_fault(tmp_path: Path, values: list[list[float]]) -> None:
    with PairStoreWriter(tmp_path / "pairs", 1003, columns=["a", "b"]) as writer, pytest.raises(AssertionError):
        writer.add(make_pairs(1, 1003)[0], values[0])


def test_the_fingerprint_is_the_one_that_earlier_runs_kept(tmp_path: Path) -> None:
    """Lengths and members hashed as whole arrays, whatever the pieces they are read in."""
    write(tmp_path / "pairs", make_pairs(7, 1003))
    store = PairStore(tmp_path / "pairs")
    first, last = PairCollection([store]).split(0.4)
    both = PairCollection.combine([last, first], [0.5, 0.5])
    facts = content_facts(store)
    assert facts["lengths"] == hashlib.sha256(store.lengths.tobytes()).hexdigest()
    members = np.concatenate([np.resize([4, 5, 6], 4), 7 + np.arange(4)])
    content = hashlib.sha256(json.dumps([facts, facts], sort_keys=True).encode() + members.astype(np.int64).tobytes())
    assert collection_fingerprint(both) == content.hexdigest()
