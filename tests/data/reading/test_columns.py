from __future__ import annotations

import json

import pytest

from megatron_rmipo.data.reading.columns import parse_columns, rename_columns, require_columns
from megatron_rmipo.errors import DataError


def test_columns_are_renamed_and_may_be_nested() -> None:
    columns = parse_columns("prompt=q, chosen=answers.good,rejected=answers.bad")
    row = rename_columns({"q": "Why?", "answers": {"good": "g", "bad": "b"}, "chosen": "stale"}, columns)
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("Why?", "g", "b")
    assert "chosen" not in rename_columns({"chosen": "stale"}, {"chosen": "absent"})


@pytest.mark.parametrize("as_text", [False, True])
def test_what_no_path_takes_of_a_mapping_is_a_column(as_text: bool) -> None:
    given = {"messages": ["m"], "tools": ["f"], "id": 7}
    row = rename_columns(
        {"input": json.dumps(given) if as_text else given, "other": 1}, parse_columns("prompt=input.messages[0],first=input.no")
    )
    assert row == {"prompt": "m", "input.tools": ["f"], "input.id": 7, "other": 1}
    assert rename_columns({"input": given}, {"input": "input.id"}) == {"input": 7, "input.messages": ["m"], "input.tools": ["f"]}


MESSAGES = [{"content": "first"}, {"content": "last"}]
ROW = {
    "messages": MESSAGES,
    "text": json.dumps({"messages": MESSAGES}),
    "by_number": {"0": "zero"},
    "a.b": "dotted",
    "grid": [[1, 2]],
}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("messages.0.content", "first"),
        ("messages[0].content", "first"),
        ("messages.-1.content", "last"),
        ("messages[-1].content", "last"),
        ("messages.2.content", None),
        ("messages.-3.content", None),
        ("messages.content", None),
        ("messages.0.content.0", None),
        ("grid[0][1]", 2),
        ("by_number.0", "zero"),
        ("text.messages.-1.content", "last"),
        ("a.b", "dotted"),
    ],
)
def test_a_path_reaches_into_lists_and_json_text(path: str, expected: object) -> None:
    assert rename_columns(ROW, parse_columns(f"chosen={path}")).get("chosen") == expected


def test_a_path_that_leads_nowhere_is_an_error() -> None:
    require_columns([{}, ROW], {"chosen": "messages.1.content"})
    with pytest.raises(DataError, match=r"--columns chosen=messages\.2\.content: no such column. The rows have: messages, text"):
        require_columns([ROW], {"chosen": "messages.2.content"})


@pytest.mark.parametrize("text", ["prompt", "prompt=", "=x", "promt=x", "prompt=a,prompt=b"])
def test_a_wrong_columns_flag_is_an_error(text: str) -> None:
    with pytest.raises(DataError, match="--columns"):
        parse_columns(text)
