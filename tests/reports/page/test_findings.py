"""What a report warns of, and what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rmipo.reports.page import findings
from megatron_rmipo.reports.page.run_files import read_page_run
from tests.reports.page.runs import NUM_PAIRS, eval_record, pair_values, write_page_run

CALM: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("changes", "title", "words"),
    [
        (CALM, None, ""),
        ({"facts": {"train_iters": 99}}, "The run is not complete", "step 30 of 99"),
        ({"before": []}, "No held-out pairs", "--split 99,1"),
        ({"before": pair_values(0.4)[:40], "after": pair_values(0.8)[:40]}, "Too few held-out pairs", "40 pairs: an accuracy"),
        ({"skipped_steps": 2}, "Steps were skipped", "In 2 steps"),
        ({"after": pair_values(0.8, chosen=-0.9)}, "Chosen responses have become less likely", "changed by -0.400 nats"),
        ({"after": pair_values(0.8, chosen=-0.52)}, None, ""),
        ({"between": [eval_record(15, pair_values(0.8), loss=0.3)]}, "The held-out loss has turned", "0.3000 at step 15"),
        ({"between": [eval_record(15, pair_values(0.8), loss=0.528)]}, None, ""),
        ({"after": pair_values(0.8, **{"gamma/at_max": 0.75})}, "Most target margins are at gamma_max", "Of 75%"),
        ({"pipeline_bubble": 0.4}, "Pipeline stages stand still", "For 40% of a step"),
        ({"straggler_share": 0.3, "straggler_rank": 3.0, "straggler_host": "n7"}, "One rank holds up the others", "3 on n7"),
        (
            {"facts": {"data": {"train": {"sets": [{"prefix": "d", "counts": {"rows": 100, "kept": 80}}]}}}},
            "Many rows of the data were left out",
            "20 of the 100 rows of d",
        ),
    ],
)
def test_a_run_is_warned_of_what_it_shows(changes: dict[str, Any], title: str | None, words: str, tmp_path: Path) -> None:
    changes = dict(changes)
    facts = changes.pop("facts", {})
    found = findings.find(read_page_run(write_page_run(tmp_path / "run", facts=facts, **changes)))
    assert [finding.title for finding in found] == ([] if title is None else [title])
    assert words in "".join(finding.text for finding in found)


@pytest.mark.parametrize(("longer_right", "shorter_right", "said"), [(30, 15, True), (30, 28, False), (15, 30, False)])
def test_a_preference_for_length_is_one_beyond_its_error(
    longer_right: int, shorter_right: int, said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = pair_values(0.5)
    for number, pair in enumerate(pairs):
        right = number % 30 < (longer_right if number < 30 else shorter_right)
        pair["rewards/accuracies"] = float(right)
    # The chosen response is the longer one in the first half.
    lengths = np.array([[9, 5] if number < 30 else [5, 9] for number in range(NUM_PAIRS)])
    monkeypatch.setattr(findings, "held_out_lengths", lambda config: lengths)
    found = findings.find(read_page_run(write_page_run(tmp_path / "run", before=pair_values(0.4), after=pairs)))
    assert [finding.title for finding in found] == (["Longer responses are preferred"] if said else [])
