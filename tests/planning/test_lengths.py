"""Lengths of pairs: of files, of numbers, of prepared data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.planning.lengths import equal_lengths, read_lengths
from tests.integration.data import FIXTURE, write_pairs
from tests.parity.replay import read_pairs as read_fixture


def test_of_a_file_of_numbers(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("prompt,chosen,rejected\n5,7,3\n90,20,40\n")
    found = read_lengths(str(path), num_pairs=1000)
    assert found.lengths.tolist() == [[5, 7, 3], [90, 20, 40]]
    assert (len(found), found.num_pairs) == (2, 1000)
    # A pair as long as it may be: the prompt makes room for the longer response.
    cut = found.shortened(100)
    assert (cut.lengths.tolist(), cut.num_cut) == ([[5, 7, 3], [60, 20, 40]], 1)
    assert found.with_mismatched().mismatched.lengths.tolist() == [[5, 20, 40], [90, 7, 3]]  # type: ignore[union-attr]
    assert sorted(set(found.batch(5).tolist())) == [0, 1]


def test_of_prepared_pairs(tmp_path: Path) -> None:
    prefix = write_pairs(tmp_path / "pairs")
    found = read_lengths(str(prefix) + ".bin")
    lengths = [[len(pair.prompt), len(pair.chosen), len(pair.rejected)] for pair in read_fixture(FIXTURE)]
    assert np.array_equal(found.lengths, lengths)
    assert found.num_pairs == 48


def test_all_alike() -> None:
    found = equal_lengths("200,30,40", 77)
    assert found.lengths_of(found.batch(3)).tolist() == [[200, 30, 40]] * 3
    assert str(found).startswith("--lengths 200,30,40: 77 pairs an epoch, mean 200 + 30 / 40 tokens")


@pytest.mark.parametrize("text", ["200,300", "1,2,x", "0,1,1", "1,-2,3"])
def test_numbers_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--lengths .*200,300,300"):
        equal_lengths(text, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("prompt,chosen\n1,2\n", "lengths.csv:1"),
        ("prompt,chosen,rejected\n1,2,3\n1,2\n", "lengths.csv:3"),
        ("prompt,chosen,rejected\n1,x,3\n", "'1,x,3'"),
        ("prompt,chosen,rejected\n", "holds no pair"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "lengths.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_lengths(str(path))
    assert words in str(caught.value)
