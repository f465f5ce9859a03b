from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from megatron_rmipo.data.layouts.formats import FORMATS, recognise_format, refuse_mixed
from megatron_rmipo.data.layouts.reader import parse_row
from megatron_rmipo.data.layouts.transcripts import transcript_turns
from megatron_rmipo.data.reading.rows import PreferencePair, RowFault, Turn
from megatron_rmipo.errors import DataError
from tests.data.pairs import pair_of

USER = Turn("user", "Why?")
PAIR = pair_of((USER,), "Because.", "No idea.")
LONG = pair_of((Turn("system", "Be brief."), USER, Turn("assistant", "What?"), Turn("user", "That.")), "Because.", "No idea.")


def messages(*turns: Turn) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def sharegpt(*turns: Turn) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[turn.role], "value": turn.content} for turn in turns]


def answer(text: str) -> Turn:
    return Turn("assistant", text)


HH_LONG = "Be brief.\n\nHuman: Why?\n\nAssistant: What?\n\nHuman: That.\n\nAssistant:"
ROWS: list[tuple[str, dict[str, Any], PreferencePair]] = [
    ("strings", {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}, PAIR),
    (
        "strings",
        {"system": "Be brief.", "prompt": "Why?", "chosen": "a", "rejected": "b"},
        pair_of((LONG.prompt[0], USER), "a", "b"),
    ),
    ("messages", {"chosen": messages(USER, answer("Because.")), "rejected": messages(USER, answer("No idea."))}, PAIR),
    (  # UltraFeedback-binarized: the text prompt repeats the first turn
        "messages",
        {"prompt": "Why?", "chosen": messages(USER, answer("Because.")), "rejected": messages(USER, answer("No idea."))},
        PAIR,
    ),
    (
        "messages",
        {"prompt": messages(*LONG.prompt), "chosen": messages(answer("Because.")), "rejected": messages(answer("No idea."))},
        LONG,
    ),
    ("messages", {"prompt": messages(*LONG.prompt), "chosen": "Because.", "rejected": "No idea."}, LONG),
    (
        "messages",
        {
            "prompt": messages(*LONG.prompt),
            "chosen": messages(*LONG.prompt, answer("Because.")),
            "rejected": messages(*LONG.prompt, answer("No idea.")),
        },
        LONG,
    ),
    ("hh", {"chosen": HH_LONG + " Because.", "rejected": HH_LONG + " No idea.\n"}, LONG),
    ("hh", {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "\n\nHuman: Why?\n\nAssistant: No idea."}, PAIR),
    ("hh", {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": " Because.", "rejected": " No idea."}, PAIR),
    (
        "sharegpt",
        {
            "conversations": sharegpt(*LONG.prompt),
            "chosen": sharegpt(answer("Because."))[0],
            "rejected": sharegpt(answer("No idea."))[0],
        },
        LONG,
    ),
    ("sharegpt", {"conversations": sharegpt(USER), "chosen": "Because.", "rejected": "No idea."}, PAIR),
]


@pytest.mark.parametrize(("name", "row", "pair"), ROWS)
def test_every_shape_is_recognised_and_read(name: str, row: dict[str, Any], pair: PreferencePair) -> None:
    assert recognise_format([row]) == name
    assert parse_row(row, FORMATS[name]) == pair


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"messages": messages(USER, Turn("assistant", "Because."))}, (USER,)),
        ({"prompt": "Why?", "prompt_id": "7", "messages": messages(USER, Turn("assistant", "Because."))}, (USER,)),
        ({"messages": messages(*LONG.prompt, Turn("assistant", "Because."))}, LONG.prompt),
        ({"prompt": "Why?", "completion": "Because."}, (USER,)),
        ({"prompt": "Why?", "response": "Because.", "system": "Be kind.", "chosen": None}, (Turn("system", "Be kind."), USER)),
        ({"prompt": messages(USER), "completion": messages(Turn("assistant", "Because."))}, (USER,)),
    ],
)
def test_every_supervised_shape_is_recognised_and_read(row: dict[str, Any], prompt: tuple[Turn, ...]) -> None:
    assert recognise_format([row]) == "supervised"
    assert parse_row(row, FORMATS["supervised"]) == pair_of(prompt, "Because.", None)


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "completion": "Because."},
        {"prompt": "Why?", "response": "Because.", "chosen": None, "rejected": None},
        {"prompt": messages(USER), "completion": messages(Turn("assistant", "Because."))},  # TRL's conversational form
        {"messages": messages(USER, Turn("assistant", "Because."))},
        {"prompt": "Why?", "messages": messages(USER, Turn("assistant", "Because."))},
    ],
)
def test_every_unpaired_shape_is_recognised_and_its_answer_placed_by_the_label(row: dict[str, Any], label: bool) -> None:
    assert recognise_format([{**row, "label": label}]) == "unpaired"
    expected = pair_of((USER,), "Because.", None) if label else pair_of((USER,), None, "Because.")
    assert FORMATS["unpaired"]({**row, "label": label}) == expected
    assert FORMATS["unpaired"]({**row, "label": int(label)}) == expected


@pytest.mark.parametrize("label", [False, 0, 1, -1, 0.0, "no", 7, "good"])
def test_any_label_but_null_makes_a_row_unpaired(label: object) -> None:
    row = {"prompt": "Why?", "completion": "Because.", "label": label}
    assert recognise_format([row]) == "unpaired"
    assert recognise_format([{**row, "label": None}]) == "supervised"
    with pytest.raises(RowFault) as fault:
        refuse_mixed(row, "supervised")
    assert (fault.value.reason, fault.value.field) == ("mixed", "label")


@pytest.mark.parametrize("column", ["label", "kto_tag"])
@pytest.mark.parametrize(
    ("yes", "no"), [(1, 0), (1, -1), (1.0, 0.0), ("true", "False"), ("YES", "no"), ("1", "-1"), ("1.0", "0"), (True, False)]
)
def test_a_label_is_read_in_every_writing(yes: object, no: object, column: str) -> None:
    good, bad = ({"prompt": "Why?", "completion": "Because.", column: label} for label in (yes, no))
    assert recognise_format([good, bad]) == "unpaired"
    assert FORMATS["unpaired"](good) == pair_of((USER,), "Because.", None)
    assert FORMATS["unpaired"](bad) == pair_of((USER,), None, "Because.")


@pytest.mark.parametrize("label", ["good", "truly", 2, -2, 0.5, [True], {"a": 1}])
def test_a_label_that_is_neither_true_nor_false_is_named(label: object) -> None:
    expected = f"true/false, yes/no, 1/0 or 1/-1 expected, found {type(label).__name__} "
    with pytest.raises(RowFault, match=re.escape(expected)) as fault:
        FORMATS["unpaired"]({"prompt": "Why?", "completion": "Because.", "label": label})
    assert (fault.value.reason, fault.value.field) == ("bad_label", "label")
    assert repr(label) in fault.value.message


def test_the_commonest_kind_of_three_is_the_data_sets() -> None:
    pair = ROWS[0][1]
    supervised = {"prompt": "Why?", "completion": "Because.", "label": None}
    unpaired = {**supervised, "label": True}
    assert recognise_format([pair, supervised, unpaired, {**unpaired, "label": False}]) == "unpaired"
    assert recognise_format([supervised, unpaired, unpaired]) == "unpaired"
    assert recognise_format([pair, unpaired, supervised, supervised]) == "supervised"
    assert recognise_format([unpaired, supervised, pair]) == "strings"


def test_most_rows_decide_whether_the_data_hold_pairs() -> None:
    supervised = {"prompt": "Why?", "messages": messages(USER, Turn("assistant", "Because.")), "chosen": None, "rejected": None}
    pair = {**supervised, "chosen": supervised["messages"], "rejected": messages(USER, Turn("assistant", "No idea."))}
    assert recognise_format([supervised, pair]) == "messages"
    assert recognise_format([pair, supervised, supervised]) == "supervised"
    assert recognise_format([{**supervised, "chosen": "half a pair"}, supervised]) == "supervised"


@pytest.mark.parametrize("name", list(FORMATS))
def test_the_other_kind_of_row_is_refused(name: str) -> None:
    kinds: dict[str, list[dict[str, Any]]] = {
        "supervised": [{"messages": messages(USER, Turn("assistant", "x"))}, {"prompt": "Why?", "response": "x"}],
        "unpaired": [
            {"messages": messages(USER, Turn("assistant", "x")), "label": False},
            {"prompt": "Why?", "response": "x", "label": True},
        ],
        "pairs": [{"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}],
    }
    for row in kinds.pop(name if name in kinds else "pairs"):
        refuse_mixed(row, name)
    if name == "unpaired":  # without a label a row lacks a column
        for row in kinds.pop("supervised"):
            refuse_mixed(row, name)
            with pytest.raises(RowFault) as fault:
                FORMATS[name](row)
            assert (fault.value.reason, fault.value.field) == ("missing_field", "label")
    for row in itertools.chain(*kinds.values()):
        with pytest.raises(RowFault) as fault:
            refuse_mixed(row, name)
        assert fault.value.reason == "mixed"


def test_a_row_of_another_kind_is_told_the_remedy() -> None:
    with pytest.raises(
        RowFault, match="an answer labelled False in supervised data; use --format unpaired, or --ignore-columns label"
    ):
        refuse_mixed({"prompt": "Why?", "response": "x", "label": False}, "supervised")
    with pytest.raises(RowFault, match=r"a pair in unpaired data; name its format with --format$"):
        refuse_mixed(ROWS[0][1], "unpaired")


def test_unusable_first_rows_do_not_hide_the_format() -> None:
    assert recognise_format([{"prompt": "x"}, {"prompt": None, "chosen": None, "rejected": None}, ROWS[0][1]]) == "strings"


def test_an_unknown_format_names_the_columns_and_the_flags() -> None:
    with pytest.raises(DataError, match=r"question, good, bad\n(.*\n)*.*--columns(.*\n)*.*--format"):
        recognise_format([{"question": "a", "good": "b", "bad": "c"}])
    with pytest.raises(DataError, match=r"unpaired rows: *--columns prompt=COLUMN,response=COLUMN,label=COLUMN"):
        recognise_format([{"question": "a", "good": True}])


@pytest.mark.parametrize(
    ("name", "row", "reason", "field"),
    [
        ("strings", {"prompt": "x", "chosen": 3, "rejected": "y"}, "not_text", "chosen"),
        ("strings", {"prompt": "x", "chosen": "y"}, "missing_field", "rejected"),
        ("strings", {"prompt": None, "chosen": "y", "rejected": "z"}, "missing_field", "prompt"),
        ("messages", {"chosen": "text", "rejected": "text"}, "missing_field", "prompt"),
        ("supervised", {"messages": messages(USER)}, "bad_turns", "messages"),
        ("supervised", {"messages": []}, "empty_response", "messages"),
        ("supervised", {"messages": "text", "prompt": "x"}, "not_text", "messages"),
        ("supervised", {"messages": messages(Turn("assistant", "x"))}, "missing_field", "prompt"),
        ("supervised", {"completion": "x"}, "missing_field", "prompt"),
        ("supervised", {"prompt": "x"}, "missing_field", "messages"),
        ("unpaired", {"prompt": "x", "completion": "y"}, "missing_field", "label"),
        ("unpaired", {"prompt": "x", "completion": "y", "label": None}, "missing_field", "label"),
        ("unpaired", {"prompt": "x", "label": True}, "missing_field", "messages"),
        ("unpaired", {"completion": "y", "label": True}, "missing_field", "prompt"),
        ("unpaired", {"messages": messages(USER), "label": False}, "bad_turns", "messages"),
        ("messages", {"chosen": messages(USER), "rejected": messages(USER)}, "bad_turns", "chosen"),
        ("messages", {"chosen": [], "rejected": []}, "empty_response", "chosen"),
        (
            "messages",
            {"chosen": messages(USER, answer("a")), "rejected": messages(Turn("user", "Who?"), answer("b"))},
            "prompt_mismatch",
            "rejected",
        ),
        ("messages", {"chosen": [{"role": "narrator", "content": "x"}], "rejected": []}, "malformed", "chosen"),
        ("messages", {"chosen": [{"role": "user", "content": 1}], "rejected": []}, "not_text", "chosen"),
        ("messages", {"chosen": [{"role": "user", "content": [{"type": "image"}]}], "rejected": []}, "not_text", "chosen"),
        ("hh", {"chosen": "no marks", "rejected": "none"}, "malformed", "chosen"),
        ("hh", {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, "bad_turns", "chosen"),
        (
            "hh",
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"},
            "prompt_mismatch",
            "rejected",
        ),
        ("sharegpt", {"conversations": "x", "chosen": "a", "rejected": "b"}, "not_text", "conversations"),
    ],
)
def test_a_bad_row_names_reason_and_field(name: str, row: dict[str, Any], reason: str, field: str) -> None:
    with pytest.raises(RowFault) as fault:
        FORMATS[name](row)
    assert (fault.value.reason, fault.value.field) == (reason, field)


def test_text_parts_of_a_message_are_joined() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]}
    row = {"prompt": [parts], "chosen": "Because.", "rejected": "No idea."}
    assert FORMATS["messages"](row) == PAIR


def test_transcripts_may_lack_the_leading_blank_line_and_mention_marks_inline() -> None:
    turns = transcript_turns("Human: say 'Assistant: x'\n\nAssistant: Assistant: x", "chosen")
    assert turns == (Turn("user", "say 'Assistant: x'"), Turn("assistant", "Assistant: x"))


HH_ENDS = (" a.", " a.\n\nHuman: b", " a.\n\nHuman: b\n\nAssistant: c", " a.\n\nAssistant:", " a.\n\n", "\n\n\nAssistant: d", "")


@pytest.mark.parametrize("start", ["\n\nHuman: x", "Human: x", "System.\n\nHuman: x", "\n\nHuman: x\n\nAssistant: y\n\nHuman: z"])
@pytest.mark.parametrize("chosen", HH_ENDS)
@pytest.mark.parametrize("rejected", HH_ENDS)
def test_a_transcript_that_repeats_the_other_is_read_as_by_itself(start: str, chosen: str, rejected: str) -> None:
    row = {"chosen": f"{start}\n\nAssistant:{chosen}", "rejected": f"{start}\n\nAssistant:{rejected}"}
    expected = [transcript_turns(text, field) for field, text in row.items()]
    if expected[0][:-1] != expected[1][:-1] or "user" in (expected[0][-1].role, expected[1][-1].role):
        with pytest.raises(RowFault) as fault:
            FORMATS["hh"](row)
        assert fault.value.reason in ("prompt_mismatch", "bad_turns")
        return
    pair = FORMATS["hh"](row)
    assert pair.prompt == expected[0][:-1] == expected[1][:-1]
    assert (pair.chosen, pair.rejected) == (expected[0][-1], expected[1][-1])
