from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_rmipo.data.layouts.formats import FORMATS
from megatron_rmipo.data.layouts.messages import turn_of
from megatron_rmipo.data.layouts.reader import parse_row
from megatron_rmipo.data.reading.rows import RowFault, Turn

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


@pytest.mark.parametrize(
    ("message", "turn"),
    [
        ({"role": "User", "content": "a"}, Turn("user", "a")),
        ({"role": None, "from": "HUMAN", "value": "a", "content": None}, Turn("user", "a")),
        ({"from": "gpt", "value": "a"}, Turn("assistant", "a")),
        ({"role": "developer", "content": "a"}, Turn("system", "a")),
        ({"role": "ipython", "content": "a"}, Turn("tool", "a")),
        ({"from": "observation", "value": "a"}, Turn("tool", "a")),
        ({"role": "function_response", "content": "a", "name": "f"}, Turn("tool", "a", {"name": "f"})),
        ({"role": "tool", "content": "4", "tool_call_id": "7", "name": ""}, Turn("tool", "4", {"tool_call_id": "7"})),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, Turn("assistant", "", {"tool_calls": [CALL]})),
        (  # as parquet has it: a null for every key of other rows
            {
                "role": "assistant",
                "content": "x",
                "tool_calls": [{"id": None, **CALL, "function": {"name": "weather", "arguments": {"city": "Oslo", "day": None}}}],
                "thinking": None,
            },
            Turn("assistant", "x", {"tool_calls": [CALL]}),
        ),
        (
            {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]},
            Turn("assistant", "", {"tool_calls": [CALL]}),
        ),
        ({"role": "assistant", "tool_calls": json.dumps([CALL])}, Turn("assistant", "", {"tool_calls": [CALL]})),
        (
            {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
            Turn("assistant", "", {"tool_calls": [CALL]}),
        ),
        (
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
            Turn("assistant", "", {"tool_calls": [CALL]}),
        ),
        ({"role": "assistant", "content": "a", "reasoning_content": "hm"}, Turn("assistant", "a", {"reasoning_content": "hm"})),
        ({"role": "assistant", "content": "a", "channel": "final"}, Turn("assistant", "a", {"channel": "final"})),
        ({"role": "user", "content": "a", "id": 7, "timestamp": 3.5, "model": "x", "tool_calls": []}, Turn("user", "a")),
        ({"role": "user", "content": "a", "weight": 0}, Turn("user", "a")),
        ({"role": "assistant", "content": "a", "train": True}, Turn("assistant", "a")),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "value": " b", "text": None}]},
            Turn("user", "a b"),
        ),
        (
            {"role": "assistant", "content": [{"type": "reasoning", "text": "hmm"}, {"type": "text", "text": "A"}]},
            Turn("assistant", "A", {"reasoning_content": "hmm"}),
        ),
    ],
)
def test_a_message_counts_whole(message: dict[str, Any], turn: Turn) -> None:
    assert turn_of(message, "chosen") == turn


@pytest.mark.parametrize(
    ("message", "reason", "says"),
    [
        ({"role": "narrator", "content": "a"}, "malformed", "narrator"),
        ({"role": None, "content": "a"}, "malformed", "no role"),
        ({"0": "a"}, "malformed", "no role: dict {'0': 'a'}"),
        ({"role": "user", "from": "gpt", "content": "a"}, "malformed", "two things"),
        ({"role": "user", "content": "a", "value": "b"}, "malformed", "two things"),
        ({"role": "user", "content": None}, "not_text", "NoneType"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "not_text", "image_url"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "image": "x.png"}]}, "not_text", "x.png"),
        ({"role": "user", "content": ["a"]}, "not_text", "'a'"),
        ({"role": "assistant", "content": "a", "tool_calls": [{"id": "7"}]}, "malformed", "name of a function"),
        ({"role": "assistant", "content": "a", "tool_calls": [{"name": "f", "arguments": "{cut"}]}, "malformed", "{cut"),
        ({"role": "assistant", "content": "a", "tool_calls": [{"name": "f", "arguments": "[1]"}]}, "malformed", "mapping"),
        ({"role": "assistant", "tool_calls": [CALL], "function_call": CALL["function"]}, "malformed", "both"),
        ({"from": "function_call", "value": "f(Oslo)"}, "malformed", "f(Oslo)"),
        ({"role": "user", "content": "a", "train": True}, "unread", "train"),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "unread", "weight"),
        (
            {"role": "assistant", "content": [{"type": "thinking", "text": "h"}], "reasoning_content": "g"},
            "malformed",
            "reasoning",
        ),
    ],
)
def test_what_a_message_cannot_mean_is_named(message: dict[str, Any], reason: str, says: str) -> None:
    with pytest.raises(RowFault) as fault:
        turn_of(message, "chosen")
    assert (fault.value.reason, fault.value.field) == (reason, "chosen")
    assert says in fault.value.message


def test_messages_as_json_text_are_messages_and_other_text_is_text() -> None:
    prompt = [{"role": "user", "content": "Why?"}]
    row = {"prompt": json.dumps(prompt), "chosen": json.dumps([{"from": "gpt", "value": "So."}]), "rejected": '{"a": [1]}'}
    assert next(name for name, form in FORMATS.items() if form.matches(row)) == "messages"
    pair = parse_row(row, FORMATS["messages"])
    assert pair == ((Turn("user", "Why?"),), Turn("assistant", "So."), Turn("assistant", '{"a": [1]}'), {}, {})
    for text in (str(prompt), json.dumps(prompt)[:-3]):  # Python's notation; cut off
        with pytest.raises(RowFault) as fault:
            parse_row({**row, "prompt": text}, FORMATS["messages"])
        assert (fault.value.reason, fault.value.field) == ("malformed", "prompt")


def test_an_answer_that_is_a_call_is_an_answer_and_calls_tell_answers_apart() -> None:
    called = [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    row = {"prompt": "Weather?", "chosen": called, "rejected": [{"role": "assistant", "content": ""}]}
    with pytest.raises(RowFault) as fault:
        parse_row(row, FORMATS["messages"])
    assert (fault.value.reason, fault.value.field) == ("empty_response", "rejected")
    other = [{"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": {"city": "Bergen"}}]}]
    assert parse_row({**row, "rejected": other}, FORMATS["messages"]).chosen == Turn("assistant", "", {"tool_calls": [CALL]})
    with pytest.raises(RowFault) as fault:
        parse_row({**row, "rejected": called}, FORMATS["messages"])
    assert fault.value.reason == "identical"


def test_only_an_earlier_answer_may_be_marked_as_not_learned() -> None:
    asked = {"role": "user", "content": "Why?"}
    earlier = {"role": "assistant", "content": "What?", "weight": 0}
    row = {"prompt": [asked, earlier, {"role": "user", "content": "That."}], "chosen": "So.", "rejected": "No."}
    assert [turn.fields for turn in parse_row(row, FORMATS["messages"]).prompt] == [{}, {}, {}]
    with pytest.raises(RowFault, match="not to be learned") as fault:
        parse_row({"prompt": [asked], "chosen": [earlier], "rejected": "No."}, FORMATS["messages"])
    assert (fault.value.reason, fault.value.field) == ("unread", "chosen")


def test_half_a_character_within_a_call_is_found() -> None:
    call = {"name": "f", "arguments": {"city": "\ud83d"}}
    row = {"prompt": "Why?", "chosen": [{"role": "assistant", "tool_calls": [call]}], "rejected": "No."}
    with pytest.raises(RowFault) as fault:
        parse_row(row, FORMATS["messages"])
    assert (fault.value.reason, fault.value.field) == ("not_encodable", "chosen")
