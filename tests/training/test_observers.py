"""What a run says of itself before its first step."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest

from megatron_rmipo.reports.reporter import Reporter
from megatron_rmipo.training.observers import warn_of_few_pairs


@pytest.mark.parametrize(
    ("num_held_out", "eval_pairs", "words"),
    [
        (1, None, ["held-out pairs: 1,", "standard error of 0.50", "hold out 50 or more", "--split and --valid-data-path"]),
        (49, 49, ["held-out pairs: 49,", "standard error of 0.07", "raise --eval-pairs 49"]),
        (49, 64, ["--split and --valid-data-path"]),
        (50, None, []),
        (0, None, []),
    ],
)
def test_too_few_held_out_pairs_are_warned_of(
    tmp_path: Path, num_held_out: int, eval_pairs: int | None, words: list[str]
) -> None:
    screen = StringIO()
    with Reporter(tmp_path, total_steps=3, config={}, stream=screen) as reporter:
        warn_of_few_pairs(num_held_out, eval_pairs, reporter)
    said = screen.getvalue()
    assert all(word in said for word in words), said
    assert said.startswith("warning: ") == bool(words)
