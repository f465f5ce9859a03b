from __future__ import annotations

from typing import Any

import pytest

from megatron_rmipo.data.layouts.formats import parse_unpaired
from megatron_rmipo.data.layouts.reader import RowOptions, RowReader, parse_row
from megatron_rmipo.data.reading.rows import PreferencePair, RowFault, Turn
from tests.data.pairs import pair_of

GOOD = {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}


def read(row: dict[str, Any], form: str = "strings", **options: Any) -> PreferencePair:
    return RowReader(RowOptions(form, {}, **options))(row)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": " \n"}, "empty_prompt"),
        ({"chosen": ""}, "empty_response"),
        ({"rejected": "\t"}, "empty_response"),
        ({"rejected": " Because.\n"}, "identical"),
        ({"chosen_score": 3, "rejected_score": 3.0}, "tied"),
        ({"prompt": "Why \ud83d?"}, "not_encodable"),
        ({"chosen": "\ude00"}, "not_encodable"),
        ({"rejected": "No \ud83d"}, "not_encodable"),
        ({"metadata": {"score_chosen": 7.5, "score_rejected": 7.5}}, "tied"),
    ],
)
def test_unusable_pairs_are_refused_by_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowFault) as fault:
        read({**GOOD, **changes})
    assert fault.value.reason == reason


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize(("text", "reason"), [(" \n", "empty_response"), ("half \ud83d", "not_encodable")])
def test_the_one_answer_of_an_unpaired_row_is_checked(text: str, reason: str, label: bool) -> None:
    with pytest.raises(RowFault) as fault:
        parse_row({"prompt": "Why?", "completion": text, "label": label}, parse_unpaired)
    assert (fault.value.reason, fault.value.field) == (reason, "response")


def test_ties_can_be_kept_and_other_scores_do_not_matter() -> None:
    pair = pair_of((Turn("user", "Why?"),), "Because.", "No idea.")
    assert read({**GOOD, "chosen_score": 3, "rejected_score": 3}, keep_ties=True) == pair
    assert read({**GOOD, "chosen_score": None, "rejected_score": None}) == pair
    assert read({**GOOD, "chosen_score": 1, "rejected_score": 3}) == pair


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ((Turn("user", "a"), Turn("assistant", "b")), "bad_turns"),
        ((Turn("user", "a"), Turn("system", "b"), Turn("user", "c")), "bad_turns"),
        ((Turn("system", "only"),), "empty_prompt"),
    ],
)
def test_impossible_turns_are_refused(turns: tuple[Turn, ...], reason: str) -> None:
    with pytest.raises(RowFault) as fault:
        parse_row({}, lambda _row: pair_of(turns, "x", "y"))
    assert fault.value.reason == reason


def test_an_empty_system_turn_is_left_out() -> None:
    pair = parse_row({}, lambda _row: pair_of((Turn("system", " "), Turn("user", "a")), "x", "y"))
    assert pair.prompt == (Turn("user", "a"),)
