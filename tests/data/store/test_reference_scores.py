"""Scores beside the data: what is finished is used, what is not goes on, what is damaged or foreign is refused."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from megatron_rmipo.data.store.reference_scores import ScoreKey, ScoreWriter, data_fingerprint, open_scores, score_directory
from megatron_rmipo.errors import DataError
from tests.integration.data import write_pairs

KEY = ScoreKey("data", "tokenizer", "reference", "float32", "matched")
SCORES = np.arange(14, dtype=np.float32).reshape(7, 2) - 300.0


def test_scores_come_back_as_they_were_written_after_a_stop_in_the_middle(tmp_path: Path) -> None:
    directory = tmp_path / "scores"
    assert open_scores(directory, KEY, 7) is None
    writer = ScoreWriter(directory, KEY, 7)
    writer.write(SCORES[:3])
    assert open_scores(directory, KEY, 7) is None
    later = ScoreWriter(directory, KEY, 7)
    assert later.num_done == 3
    later.write(SCORES[3:])
    found = open_scores(directory, KEY, 7)
    assert found is not None
    assert found.tolist() == SCORES.tolist()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["progress.json", "scores", "scores.npy"]


def test_every_field_of_the_key_leads_elsewhere(tmp_path: Path) -> None:
    places = {score_directory("a/b", None, KEY)}
    for field in ("data", "tokenizer", "reference", "dtype", "kind"):
        places.add(score_directory("a/b", None, dataclasses.replace(KEY, **{field: "other"})))
    assert len(places) == 6
    assert all(place.parent == Path("a/b.reference") for place in places)
    assert score_directory("a/b", str(tmp_path), KEY).parent == tmp_path


def test_scores_under_another_key_are_refused_even_in_the_same_place(tmp_path: Path) -> None:
    ScoreWriter(tmp_path / "scores", KEY, 7).write(SCORES)
    other = dataclasses.replace(KEY, reference="another")
    for use in (lambda: open_scores(tmp_path / "scores", other, 7), lambda: ScoreWriter(tmp_path / "scores", other, 7)):
        with pytest.raises(DataError, match=r"progress\.json: holds scores for .*Remove"):
            use()


def test_two_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    first, second = (ScoreWriter(tmp_path / "scores", KEY, 7) for _ in range(2))
    first.write(SCORES[:5])
    second.write(SCORES[:2])
    assert open_scores(tmp_path / "scores", KEY, 7) is None
    first.write(SCORES[5:])
    # The one behind does not take back what the other has finished.
    second.write(SCORES[2:4])
    found = open_scores(tmp_path / "scores", KEY, 7)
    assert found is not None
    assert found.tolist() == SCORES.tolist()


def test_a_score_that_is_not_finite_names_its_pair(tmp_path: Path) -> None:
    writer = ScoreWriter(tmp_path / "scores", KEY, 7)
    writer.write(SCORES[:3])
    bad = SCORES[3:].copy()
    bad[1, 1] = np.inf
    with pytest.raises(DataError, match="pair 4 of the data set"):
        writer.write(bad)
    assert ScoreWriter(tmp_path / "scores", KEY, 7).num_done == 3


@pytest.mark.parametrize("damage", ["short", "empty", "shape", "hole", "progress"])
def test_damage_is_told_with_the_remedy(tmp_path: Path, damage: str) -> None:
    directory = tmp_path / "scores"
    ScoreWriter(directory, KEY, 7).write(SCORES)
    if damage == "short":
        os.truncate(directory / "scores.npy", 100)
    elif damage == "empty":
        os.truncate(directory / "scores.npy", 0)
    elif damage == "hole":
        np.save(directory / "scores.npy", np.where(SCORES[2, 1] == SCORES, np.float32(np.nan), SCORES))
    elif damage == "shape":
        np.save(directory / "scores.npy", SCORES[:5])
    else:
        (directory / "progress.json").write_text(json.dumps({"num_done": 7}))
    with pytest.raises(DataError, match=f"Remove {directory}; it is computed again"):
        open_scores(directory, KEY, 7)


def test_the_fingerprint_of_data_changes_with_one_token(tmp_path: Path) -> None:
    prefix = write_pairs(tmp_path / "pairs")
    before = data_fingerprint(str(prefix))
    assert before == data_fingerprint(str(write_pairs(tmp_path / "again")))
    content = bytearray(prefix.with_suffix(".bin").read_bytes())
    content[10] ^= 1
    prefix.with_suffix(".bin").write_bytes(content)
    assert data_fingerprint(str(prefix)) != before
