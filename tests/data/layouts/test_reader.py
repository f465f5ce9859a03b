from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_rmipo.data.layouts.formats import parse_unpaired
from megatron_rmipo.data.layouts.reader import RowOptions, RowReader, parse_row
from megatron_rmipo.data.layouts.settle import settle_reading, unread_note
from megatron_rmipo.data.reading.rows import PreferencePair, RowFault, Turn
from megatron_rmipo.errors import DataError
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


@pytest.mark.parametrize(("high", "low"), [("4.0", 4), (4, 4.0), ("4", "4.00"), (" 4 ", 4.0)])
def test_a_tie_is_one_in_any_writing(high: object, low: object) -> None:
    for names in (
        ("chosen_score", "rejected_score"),
        ("score_chosen", "score_rejected"),
        ("chosen-rating", "rejected-rating"),
        ("chosen_avg_rating", "rejected_avg_rating"),
    ):
        scores = dict(zip(names, (high, low), strict=True))
        for row in ({**GOOD, **scores}, {**GOOD, "metadata": scores}):
            with pytest.raises(RowFault) as fault:
                read(row)
            assert (fault.value.reason, names[0] in fault.value.message) == ("tied", True)


def test_an_inverted_pair_is_kept_dropped_or_swapped_and_counted() -> None:
    row = {**GOOD, "chosen_score": "1", "rejected_score": 3, "margin": 2}
    pair = pair_of((Turn("user", "Why?"),), "Because.", "No idea.")
    for choice, expected in (
        ("keep", pair._replace(values={"margin": 2.0})),
        ("swap", pair._replace(chosen=pair.rejected, rejected=pair.chosen, values={"margin": -2.0})),
    ):
        reader = RowReader(RowOptions("strings", {}, on_inverted=choice, values=("margin",)))
        assert reader(row) == expected
        assert reader.counts == {"inverted": 1}
    for choice in ("drop", "error"):
        with pytest.raises(RowFault, match="chosen_score is 1, rejected_score 3") as fault:
            read(row, on_inverted=choice)
        assert fault.value.reason == "inverted"


def test_a_missing_score_scores_nothing_and_a_strange_one_is_named() -> None:
    for high in (None, float("nan")):
        assert read({**GOOD, "chosen_score": high, "rejected_score": 3}, on_inverted="drop").chosen is not None
    with pytest.raises(RowFault) as fault:
        read({**GOOD, "chosen_score": "good", "rejected_score": 3})
    assert (fault.value.reason, fault.value.field) == ("not_number", "chosen_score")


def test_numbers_of_the_pair_are_kept_beside_it() -> None:
    row = {**GOOD, "margin": "-0.5", "beta": 0.1, "weight": 0}
    assert read(row, values=("beta", "margin", "weight")).values == {"margin": -0.5, "beta": 0.1, "weight": 0.0}
    assert read({**GOOD, "margin": None}).values == {}
    of_no_use = [{"margin": float("inf")}, {"margin": "wide"}, {"beta": 0}, {"weight": -1}, {"weight": True}]
    # Kept as fp32, where these are infinite or 0.
    for beside in (*of_no_use, {"margin": -1e300}, {"weight": "3.5e38"}, {"beta": 1e-60}):
        with pytest.raises(RowFault) as fault:
            read({**GOOD, **beside})
        assert (fault.value.reason, fault.value.field) == ("not_number", next(iter(beside)))
    with pytest.raises(RowFault, match="found str 'wide'; --ignore-columns margin leaves out"):
        read({**GOOD, "margin": "wide"})


@pytest.mark.parametrize(
    "column",
    [
        "input",
        "history",
        "images",
        "preference",
        "label",
        "winner",
        "rejected_response",
        "System Prompt",
        "instruction",
        "videos",
    ],
)
def test_a_column_that_changes_what_is_learned_is_used_or_refused(column: str) -> None:
    row = {**GOOD, column: ["x"]}
    with pytest.raises(DataError, match=f"(?s){column}, such as list .*--ignore-columns {column}"):
        settle_reading([GOOD, row], {})
    with pytest.raises(RowFault) as fault:  # in a row that was not among the first
        read(row)
    assert (fault.value.reason, fault.value.field) == ("unread", column)
    options = settle_reading([GOOD, row], {}, ignore_columns=column)
    assert RowReader(options)(row) == RowReader(options)(GOOD)
    for empty in (None, "", " ", [], [{"a": None}]):
        assert read({**GOOD, column: empty}).prompt == (Turn("user", "Why?"),)
    assert settle_reading([{**GOOD, "instruction": "Why?"}], {}).unread == frozenset()  # says what the prompt says


def test_a_refused_column_is_told_what_reads_it() -> None:
    row = {"instruction": "Why?", "response": "Because.", "context": "It is.", "system_prompt": "Be brief."}
    says = r"(?s)context, .*\(read by --columns input=context or .*system_prompt, .*\(read by --columns system=system_prompt\)"
    with pytest.raises(DataError, match=says):
        settle_reading([row], {})
    columns = {"input": "context", "system": "system_prompt"}
    prompt = (Turn("system", "Be brief."), Turn("user", "Why?\nIt is."))
    assert RowReader(settle_reading([row], columns))(row).prompt == prompt
    with pytest.raises(DataError, match=r"context, such as str 'It is\.' \(read by --format ranked"):  # no input there
        settle_reading([{**GOOD, "context": "It is."}], {})


@pytest.mark.parametrize("as_text", [False, True])
def test_fields_of_messages_may_be_left_out(as_text: bool) -> None:
    def told(text: str, mood: str) -> Any:
        turns = [
            {"role": "user", "content": "Why?", "mood": mood},
            {"role": "assistant", "content": text, "mood": mood, "num_tokens": 2},
        ]
        return json.dumps(turns) if as_text else turns

    row = {"chosen": told("Because.", "calm"), "rejected": told("No idea.", "wild"), "tools": [{"name": "f", "mood": "m"}]}
    with pytest.raises(RowFault) as fault:  # the two prompts differ in it
        read(row, "messages")
    assert fault.value.reason == "prompt_mismatch"
    pair = pair_of((Turn("user", "Why?"),), "Because.", "No idea.")
    ignored = frozenset({"mood", "content"})  # content is what a message is, however a column is called
    assert read(row, "messages", ignored=ignored) == pair._replace(variables={"tools": row["tools"]})


def test_other_columns_that_nobody_reads_are_named() -> None:
    rows = [{**GOOD, "id": 7, "source": None}, {**GOOD, "source": "web", "chosen_score": 2, "metadata": {"score_chosen": 1}}]
    options = settle_reading(rows, {})
    assert options.unread == {"id", "source"}
    assert "format strings: id, source." in unread_note(options.unread, options.format)
    reader = RowReader(options)
    reader({**rows[0], "late": 1})
    assert reader.counts == {"unread/late": 1}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"columns": {"prompt": "q"}, "ignore_columns": "q"}, "--ignore-columns q: --columns reads it"),
        ({"columns": {"label": "q"}}, "--columns label=q: format strings reads no label"),
        ({"winner_values": "first=1,second=2"}, "--winner-values: format strings has no winner"),
        ({"form": "supervised", "on_inverted": "swap"}, "--on-inverted swap: format supervised"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        settle_reading([{**GOOD, "q": "x"}], flags.pop("columns", {}), **flags)


def test_labels_of_three_kinds_are_refused() -> None:
    rows = [{"prompt": "Why?", "completion": "So.", "label": label} for label in (1, 0, -1)]
    with pytest.raises(DataError, match="0 and -1 both"):
        settle_reading(rows, {})
