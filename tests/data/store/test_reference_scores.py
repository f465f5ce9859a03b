"""Scores beside the data: rows that are scored are used, others are known, what is damaged or foreign is refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.in_memory import PairsInMemory
from megatron_rmipo.data.store.reference_scores import (
    ScoreKey,
    ScoreTable,
    ScoreWriter,
    data_fingerprint,
    open_scores,
    refuse_not_finite,
    score_directory,
)
from megatron_rmipo.errors import DataError
from tests.integration.data import write_pairs

KEY = ScoreKey("data", "tokenizer", "reference", "float32", "matched")
SCORES = np.arange(14, dtype=np.float32).reshape(7, 2) - 300.0


def write(directory: Path, rows: Sequence[int], scores: np.ndarray = SCORES) -> None:
    with ScoreWriter(directory, KEY, 7) as writer:
        writer.write(np.array(rows), scores[list(rows)])


def kept(directory: Path) -> tuple[list[list[float]], list[int]]:
    """What is there of all rows, and which rows are not."""
    found = open_scores(directory, KEY, 7)
    assert found is not None
    missing = [row for block in found.unscored().blocks(2) for row in block.tolist()]
    return found[np.arange(7)].tolist(), missing


def test_scores_come_back_as_they_were_written_in_any_order(tmp_path: Path) -> None:
    directory = tmp_path / "scores"
    assert open_scores(directory, KEY, 7) is None
    write(directory, [1, 2, 5])
    found, missing = kept(directory)
    assert missing == [0, 3, 4, 6]
    assert [found[row] for row in (1, 2, 5)] == SCORES[[1, 2, 5]].tolist()
    assert np.isnan([found[row] for row in missing]).all()
    write(directory, missing)
    assert kept(directory) == (SCORES.tolist(), [])
    again = pickle.loads(pickle.dumps(open_scores(directory, KEY, 7)))
    assert again[np.array([6, 3])].tolist() == SCORES[[6, 3]].tolist()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["progress.json", "scores", "scores.npy"]


def test_a_score_of_zero_is_a_score(tmp_path: Path) -> None:
    scores = SCORES.copy()
    scores[1, 1] = scores[2, 0] = 0.0
    scores[3] = 0.0
    write(tmp_path / "scores", [1, 2, 3], scores)
    found, missing = kept(tmp_path / "scores")
    assert missing == [0, 4, 5, 6]
    assert found[1:4] == scores[1:4].tolist()


def test_a_large_file_begins_as_a_hole(tmp_path: Path) -> None:
    num_rows = 3_000_001
    with ScoreWriter(tmp_path / "scores", KEY, num_rows) as writer:
        writer.write(np.array([5, 2_000_000, num_rows - 1]), SCORES[:3])
        writer.flush()
    status = (tmp_path / "scores" / "scores.npy").stat()
    assert status.st_size > 8 * num_rows
    assert status.st_blocks * 512 < 100_000
    found = open_scores(tmp_path / "scores", KEY, num_rows)
    assert found is not None
    assert len(found.unscored()) == num_rows - 3
    assert found[np.array([2_000_000])].tolist() == [SCORES[1].tolist()]


def as_an_older_version_left_them(directory: Path, num_done: int) -> None:
    scores = SCORES.copy()
    scores[1, 1] = 0.0
    scores[num_done:] = np.nan
    directory.mkdir()
    np.save(directory / "scores.npy", scores)
    (directory / "progress.json").write_text(json.dumps({"key": dataclasses.asdict(KEY), "num_done": num_done}))


def test_what_an_older_version_left_is_gone_on_with(tmp_path: Path) -> None:
    as_an_older_version_left_them(tmp_path / "whole", 7)
    expected = SCORES.copy()
    expected[1, 1] = 0.0
    assert kept(tmp_path / "whole") == (expected.tolist(), [])
    as_an_older_version_left_them(tmp_path / "part", 3)
    assert kept(tmp_path / "part")[1] == [3, 4, 5, 6]
    write(tmp_path / "part", [4, 6])
    found, missing = kept(tmp_path / "part")
    assert missing == [3, 5]
    assert [found[row] for row in (0, 1, 2, 4, 6)] == expected[[0, 1, 2, 4, 6]].tolist()


def test_every_field_of_the_key_leads_elsewhere(tmp_path: Path) -> None:
    places = {score_directory("a/b", None, KEY)}
    for field in ("data", "tokenizer", "reference", "dtype", "kind"):
        places.add(score_directory("a/b", None, dataclasses.replace(KEY, **{field: "other"})))
    assert len(places) == 6
    assert all(place.parent == Path("a/b.reference") for place in places)
    assert score_directory("a/b", str(tmp_path), KEY).parent == tmp_path


def test_scores_under_another_key_are_refused_even_in_the_same_place(tmp_path: Path) -> None:
    write(tmp_path / "scores", range(7))
    other = dataclasses.replace(KEY, reference="another")
    for use in (lambda: open_scores(tmp_path / "scores", other, 7), lambda: ScoreWriter(tmp_path / "scores", other, 7)):
        with pytest.raises(DataError, match=r"progress\.json: holds scores for .*Remove"):
            use()


def test_two_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "scores"
    with ScoreWriter(directory, KEY, 7) as first, ScoreWriter(directory, KEY, 7) as second:
        for writer, rows in ((first, [0, 1, 4]), (second, [0, 2]), (first, [3, 6]), (second, [1, 3])):
            writer.write(np.array(rows), SCORES[rows])
        assert kept(directory)[1] == [5]
        second.write(np.array([5]), SCORES[[5]])
    assert kept(directory) == (SCORES.tolist(), [])


def test_a_score_that_is_not_finite_names_its_pair(tmp_path: Path) -> None:
    bad = SCORES[3:].copy()
    bad[1, 1] = np.inf
    with pytest.raises(DataError, match="pair 5 of the data set"):
        refuse_not_finite(tmp_path / "scores", np.array([3, 5, 6]), bad[:3])
    refuse_not_finite(tmp_path / "scores", np.array([3]), bad[:1])


def test_a_disk_that_fails_is_named_and_what_is_written_again_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_given: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    original = os.pwrite
    with ScoreWriter(tmp_path / "scores", KEY, 7) as writer:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(DataError, match=r"No space left.*name another directory with --reference-cache"):
            writer.write(np.arange(7), SCORES)
        # The system may take less than it is given.
        monkeypatch.setattr(os, "pwrite", lambda descriptor, content, place: original(descriptor, content[:16], place))
        writer.write(np.arange(7), SCORES)
    assert kept(tmp_path / "scores") == (SCORES.tolist(), [])


@pytest.mark.parametrize("damage", ["short", "empty", "shape", "progress"])
def test_damage_is_told_with_the_remedy(tmp_path: Path, damage: str) -> None:
    directory = tmp_path / "scores"
    write(directory, range(7))
    if damage == "short":
        os.truncate(directory / "scores.npy", 100)
    elif damage == "empty":
        os.truncate(directory / "scores.npy", 0)
    elif damage == "shape":
        np.save(directory / "scores.npy", SCORES[:5])
    else:
        (directory / "progress.json").write_text(json.dumps({"num_done": 7}))
    with pytest.raises(DataError, match=f"Remove {directory}; it is computed again"):
        open_scores(directory, KEY, 7)


def test_a_number_that_is_not_finite_counts_as_none(tmp_path: Path) -> None:
    write(tmp_path / "scores", range(7))
    for bad in (np.nan, np.inf):
        np.save(tmp_path / "scores" / "scores.npy", np.where(SCORES[2, 1] == SCORES, np.float32(bad), SCORES))
        assert kept(tmp_path / "scores")[1] == [2]


def test_a_pair_without_scores_is_refused_by_its_row(tmp_path: Path) -> None:
    write(tmp_path / "scores", [1, 2, 5])
    pairs = PairCollection([PairsInMemory([([1], [2], [3])] * 7, prefix="a")])
    pairs.reference_scores = [cast(ScoreTable, open_scores(tmp_path / "scores", KEY, 7))]
    found = pairs.scores_of(np.array([1, 5, 1]))
    assert found is not None
    assert found.tolist() == SCORES[[1, 5, 1]].tolist()
    with pytest.raises(DataError, match=r"pair 3 of a has the log-probs \[nan, nan\] under the reference: not computed"):
        pairs.scores_of(np.array([2, 3]))
    pairs.reference_scores = [np.zeros((7, 2), dtype=np.float32)]
    assert pairs.scores_of(np.array([2, 3])) is not None, "zeros in memory are scores"


def test_the_fingerprint_of_data_changes_with_one_token(tmp_path: Path) -> None:
    prefix = write_pairs(tmp_path / "pairs")
    before = data_fingerprint(str(prefix))
    assert before == data_fingerprint(str(write_pairs(tmp_path / "again")))
    content = bytearray(prefix.with_suffix(".bin").read_bytes())
    content[10] ^= 1
    prefix.with_suffix(".bin").write_bytes(content)
    assert data_fingerprint(str(prefix)) != before
