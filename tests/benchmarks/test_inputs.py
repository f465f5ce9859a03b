"""Token lengths that benchmarks replay."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.inputs import RECORDED, cut_lengths, read_lengths


@pytest.mark.parametrize(("name", "num_pairs", "medians"), [("ultrafeedback", 1200, [84, 201, 184]), ("hh", 2000, [97, 45, 35])])
def test_recorded_lengths_are_whole(name: str, num_pairs: int, medians: list[int]) -> None:
    lengths = read_lengths(name)
    assert lengths.shape == (num_pairs, 3)
    assert lengths.min() > 0
    assert np.abs(np.median(lengths, axis=0) - medians).max() <= 2
    assert set(RECORDED) == {"ultrafeedback", "hh"}


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    rows = [{"prompt_len": 5, "chosen_len": 7, "rejected_len": 2}, {"prompt_len": 1, "chosen_len": 3, "rejected_len": 9}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_lengths(str(path)).tolist() == [[5, 7, 2], [1, 3, 9]]


def test_lengths_are_cut_until_prompt_and_longer_response_fit() -> None:
    lengths = np.array([[5, 3, 4], [90, 10, 20], [8, 70, 2], [90, 70, 60], [80, 20, 7]])
    assert cut_lengths(lengths, 100).tolist() == [[5, 3, 4], [80, 10, 20], [8, 50, 2], [50, 50, 50], [80, 20, 7]]
