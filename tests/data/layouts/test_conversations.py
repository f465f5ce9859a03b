from __future__ import annotations

from typing import Any

import pytest

from megatron_rmipo.data.layouts.conversations import told_twice
from megatron_rmipo.data.layouts.formats import FORMATS
from megatron_rmipo.data.layouts.reader import parse_row
from megatron_rmipo.data.reading.rows import RowFault, Turn, answer

SYSTEM, USER, MORE = Turn("system", "Be brief."), Turn("user", "Why?"), Turn("user", "That.")
WHAT = answer("What?")
LONG = (USER, WHAT, MORE)


def messages(*turns: Turn) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


@pytest.mark.parametrize(
    ("given", "near", "prompt"),
    [
        ((USER,), (USER,), (USER,)),
        ((Turn("user", " Why?\n"),), (USER,), (USER,)),  # white space: that next to the answer
        ((SYSTEM, USER), (USER,), (SYSTEM, USER)),
        ((USER,), (SYSTEM, USER), (SYSTEM, USER)),
        ((SYSTEM,), (USER,), (SYSTEM, USER)),
        ((SYSTEM, USER), (Turn("system", "Be brief. "), USER), (Turn("system", "Be brief. "), USER)),
        ((Turn("system", " "), USER), (USER,), (USER,)),
        ((USER,), LONG, LONG),  # the first turn alone
        ((MORE,), LONG, LONG),  # the last one alone
        (LONG, (MORE,), LONG),
        ((USER, WHAT), (MORE,), LONG),  # the conversation goes on
        (LONG, (), LONG),
        ((), LONG, LONG),
    ],
)
def test_two_tellings_of_a_prompt_are_one(given: tuple[Turn, ...], near: tuple[Turn, ...], prompt: tuple[Turn, ...]) -> None:
    assert told_twice(given, near, "prompt") == prompt


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ((Turn("user", "Who?"),), (USER,)),
        ((SYSTEM, USER), (Turn("system", "Be long."), USER)),
        ((USER, WHAT, MORE, WHAT), (MORE, WHAT, Turn("user", "So?"))),  # would be there twice
        ((USER, answer("Hm?"), MORE), LONG),
    ],
)
def test_two_prompts_are_not_run_together(given: tuple[Turn, ...], near: tuple[Turn, ...]) -> None:
    with pytest.raises(RowFault) as fault:
        told_twice(given, near, "prompt")
    assert (fault.value.reason, fault.value.field) == ("prompt_mismatch", "prompt")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (
            {"prompt": messages(SYSTEM, USER), "chosen": messages(USER, answer("a")), "rejected": messages(USER, answer("b"))},
            None,
        ),
        ({"prompt": "Why?", "chosen": messages(SYSTEM, USER, answer("a")), "rejected": "b"}, None),
        ({"system": "Be brief.", "chosen": messages(SYSTEM, USER, answer("a")), "rejected": messages(USER, answer("b"))}, None),
        ({"system": "Be brief.", "prompt": "Why?", "chosen": messages(answer("a")), "rejected": "b"}, None),
        (  # the chosen answer's conversation once more, as UltraFeedback-binarized has it
            {"prompt": "Why?", "messages": messages(USER, answer("a")), "chosen": messages(USER, answer("a")), "rejected": "b"},
            (USER,),
        ),
        ({"messages": messages(*LONG), "chosen": messages(answer("a"))[0], "rejected": messages(answer("b"))[0]}, LONG),
    ],
)
def test_every_column_that_tells_the_prompt_counts_once(row: dict[str, Any], prompt: tuple[Turn, ...] | None) -> None:
    assert FORMATS["messages"].matches(row)
    pair = parse_row(row, FORMATS["messages"])
    assert pair[:3] == (prompt or (SYSTEM, USER), answer("a"), answer("b"))


def test_a_system_column_goes_with_every_format_and_contradicts_none() -> None:
    transcript = "\n\nHuman: Why?\n\nAssistant:"
    row = {"system": "Be brief.", "chosen": transcript + " a", "rejected": transcript + " b"}
    assert parse_row(row, FORMATS["hh"]).prompt == (SYSTEM, USER)
    with pytest.raises(RowFault, match="two system turns") as fault:
        parse_row({**row, "chosen": "Be long." + row["chosen"], "rejected": "Be long." + row["rejected"]}, FORMATS["hh"])
    assert (fault.value.reason, fault.value.field) == ("prompt_mismatch", "system")
    with pytest.raises(RowFault) as fault:
        parse_row({**row, "system": 7}, FORMATS["hh"])
    assert (fault.value.reason, fault.value.field) == ("not_text", "system")
