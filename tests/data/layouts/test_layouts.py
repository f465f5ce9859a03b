"""Rows as other trainers and public data sets have them, read without a script."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_rmipo.data.layouts.reader import RowReader
from megatron_rmipo.data.layouts.settle import settle_reading
from megatron_rmipo.data.reading.columns import parse_columns
from megatron_rmipo.data.reading.rows import PreferencePair, RowFault, Turn, answer
from megatron_rmipo.errors import DataError
from tests.data.pairs import pair_of

USER = {"role": "user", "content": "Why?"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
PAIR = pair_of((Turn("user", "Why?"),), "good", "bad")
ROUNDS = (Turn("user", "q"), answer("a"))


def read(row: dict[str, Any], columns: str = "", **flags: Any) -> tuple[str, PreferencePair]:
    options = settle_reading([row], parse_columns(columns), **flags)
    return options.format, RowReader(options)(row)


PAIRS: list[tuple[str, dict[str, Any], PreferencePair]] = [
    ("ms_swift", {"messages": [USER, GOOD], "rejected_response": "bad"}, PAIR),
    ("ms_swift", {"messages": [USER, GOOD], "rejected_messages": [USER, BAD]}, PAIR),
    (
        "ms_swift",
        {"query": "Why?", "response": "good", "rejected_response": "bad", "history": [["q", "a"]], "system": "s"},
        pair_of((Turn("system", "s"), *ROUNDS, *PAIR.prompt), "good", "bad"),
    ),
    ("alpaca", {"instruction": "Why?", "input": "", "chosen": "good", "rejected": "bad", "history": None}, PAIR),
    (
        "alpaca",
        {"instruction": "Why?", "input": "It is.", "chosen": "good", "rejected": "bad", "history": [["q", "a"]], "system": ""},
        pair_of((*ROUNDS, Turn("user", "Why?\nIt is.")), "good", "bad"),
    ),
    ("alpaca", {"instruction": "Why?", "input": "", "output": ["good", "bad"]}, PAIR),
    ("alpaca", {"system": "", "question": "Why?", "chosen": "good", "rejected": "bad"}, PAIR),  # axolotl's chatml.intel
    ("alpaca", {"instruction": "Why?", "chosen_response": "good", "rejected_response": "bad"}, PAIR),  # chatml.argilla
    ("alpaca", {"input": "Why?", "chosen": "good", "rejected": "bad"}, PAIR),  # chatml.icr
    ("messages", {"messages": [USER], "chosen": GOOD, "rejected": BAD}, PAIR),  # axolotl's chat_template.default
    (
        "messages",
        {"chosen": [USER, GOOD], "rejected": [USER, BAD], "chosen-rating": 5.0, "rejected-rating": 2.0},
        PAIR,
    ),  # argilla
    ("messages", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, PAIR),  # OpenRLHF, TRL
    (
        "sharegpt",
        {"conversation": [{"input": "Why?", "output": "good"}], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        PAIR,
    ),  # Capybara
    (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "Why?"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        PAIR,
    ),
    (
        "ranked",
        {"context": [USER], "completions": [{"rank": 1, "completion": [BAD]}, {"rank": 0, "completion": [GOOD]}]},
        PAIR,
    ),
    (
        "ranked",
        {
            "prompt": "\n\nHuman: Why?\n\nAssistant: ",
            "answers": [{"answer": t, "rank": r} for t, r in (("so", 2.0), ("good", 1.0), ("bad", 7.0))],
        },
        PAIR,
    ),
]


@pytest.mark.parametrize(("name", "row", "pair"), PAIRS)
def test_pairs_of_other_layouts_are_recognised_and_read(name: str, row: dict[str, Any], pair: PreferencePair) -> None:
    assert read(row) == (name, pair)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Why?", "input": "", "output": "good"}, PAIR.prompt),
        (
            {"instruction": "Why?", "input": "It is.", "output": "good", "history": [["q", "a"]], "system": "s"},
            (Turn("system", "s"), *ROUNDS, Turn("user", "Why?\nIt is.")),
        ),
        ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "good"}]}, PAIR.prompt),
        (
            {"conversation": [{"input": "q", "output": "a"}, {"input": "Why?", "output": "good"}]},
            (*ROUNDS, *PAIR.prompt),
        ),
    ],
)
def test_one_answer_of_other_layouts_is_recognised_and_read(row: dict[str, Any], prompt: tuple[Turn, ...]) -> None:
    assert read(row) == ("supervised", pair_of(prompt, "good", None))
    assert read({**row, "kto_tag": False}) == ("unpaired", pair_of(prompt, None, "good"))


def test_ranks_that_tell_nothing_are_refused() -> None:
    answers = [{"answer": "good", "rank": 1}, {"answer": "bad", "rank": 1.0}]
    for given, reason in (
        (answers, "tied"),
        (answers[:1], "malformed"),
        ([{**answers[0], "rank": "best"}, answers[1]], "not_number"),
    ):
        with pytest.raises(RowFault) as fault:
            read({"prompt": "Why?", "answers": given})
        assert (fault.value.reason, fault.value.field) == (reason, "answers")
    assert read({"prompt": "Why?", "answers": ["good", "so", "bad"]}, form="ranked")[1] == PAIR
    for mark in ("overall_score", "pm_score", "Rating"):  # UltraFeedback's and Stack Exchange's answers are in no order
        scored = [{"response": "bad", "model": "a", mark: 1}, {"response": "good", "model": "b", mark: 9}]
        with pytest.raises(RowFault, match=f"the answers have {mark}, which is not read, and no rank") as fault:
            read({"instruction": "Why?", "completions": scored}, form="ranked")
        assert (fault.value.reason, fault.value.field) == ("unread", "completions")


def test_instructions_told_twice_and_answers_told_twice_are_refused() -> None:
    with pytest.raises(RowFault) as fault:
        read({"instruction": "Why?", "question": "Who?", "chosen": "good", "rejected": "bad"})
    assert (fault.value.reason, fault.value.field) == ("unread", "question")
    with pytest.raises(RowFault) as fault:
        read({"messages": [USER, GOOD], "response": "other", "prompt": "Why?"})
    assert (fault.value.reason, fault.value.field) == ("unread", "response")


def won(first: str, second: str, more: dict[str, Any]) -> dict[str, Any]:
    return {first: "good", second: "bad", **more}


WON = [  # layout, row but the verdict, column of the verdict, values that mean first, second, tie
    ("alpaca_eval", won("output_1", "output_2", {"instruction": "Why?"}), "preference", (1, 1.0, 1.2), (2, 1.93), (1.5, 0)),
    ("llmbar", won("output_1", "output_2", {"input": "Why?"}), "label", (1, "1"), (2,), (0,)),
    ("pandalm", won("response1", "response2", {"instruction": "Why?", "input": ""}), "annotator1", (1,), (2, "2"), (0,)),
    ("helpsteer2", won("response_1", "response_2", {"prompt": "Why?"}), "preference_strength", (-3, -1), (2,), (0,)),
    ("helpsteer3", won("response1", "response2", {"context": [USER]}), "overall_preference", (-2,), (1, 3), (0,)),
    (
        "which_won",
        won("first", "second", {"prompt": "Why?"}),
        "winner",
        ("A", "model_a", "[[A]]", "Response 1"),
        ("second", "assistant-b"),
        ("Tie", "both", "Both_Bad"),
    ),
    (
        "arena",
        {"conversation_a": [USER, GOOD], "conversation_b": [USER, BAD]},
        "winner",
        ("model_a",),
        ("model_b",),
        ("tie", "tie (bothbad)", "both_bad"),
    ),
]


@pytest.mark.parametrize(("name", "row", "column", "first", "second", "tie"), WON)
def test_who_won_is_read(name: str, row: dict[str, Any], column: str, first: Any, second: Any, tie: Any) -> None:
    for value in first:
        assert read({**row, column: value}) == (name, PAIR)
    for value in second:
        assert read({**row, column: value}) == (name, PAIR._replace(chosen=PAIR.rejected, rejected=PAIR.chosen))
    for value, reason in (
        *((value, "tied") for value in tie),
        (7, "bad_label"),
        ("unclear", "bad_label"),
        (None, "missing_field"),
    ):
        with pytest.raises((RowFault, DataError)) as fault:
            read({**row, column: value}, form=name)
        if isinstance(fault.value, RowFault):
            assert (fault.value.reason, fault.value.field) == (reason, column)
        else:  # a column named winner, whose values are settled before
            assert "--winner-values" in str(fault.value)


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        ("q\n<extra_id_1>Assistant\na\n<extra_id_1>User\nWhy?", (*ROUNDS, *PAIR.prompt)),
        ("<extra_id_0>System\ns\n<extra_id_1>User\nWhy?\n<extra_id_1>Assistant\n", (Turn("system", "s"), *PAIR.prompt)),
        ("<extra_id_0>System\n\n<extra_id_1>User\nWhy?\n<extra_id_1>Assistant", PAIR.prompt),
    ],
)
def test_turns_within_a_prompt_of_helpsteer_or_nemo_are_turns(prompt: str, turns: tuple[Turn, ...]) -> None:
    row = {"prompt": prompt, "response_1": "good\n<extra_id_1>", "response_2": "bad", "preference_strength": -1}
    assert read(row)[1] == PAIR._replace(prompt=turns)


def test_most_annotators_decide() -> None:
    row = WON[2][1]
    for votes, chosen in (((1, 2, 1), "good"), ((2, 2, 0), "bad"), ((1, 2, 0), None), ((2, None, None), "bad")):
        voted = {**row, **{f"annotator{i}": vote for i, vote in enumerate(votes, start=1)}}
        if chosen is None:
            with pytest.raises(RowFault, match="annotator3 is int 0"):
                read(voted)
        else:
            assert read(voted)[1].chosen == answer(chosen)


def test_columns_and_values_of_the_winner_may_be_named() -> None:
    columns = "prompt=q,first=a.text,second=b.text,winner=better"
    row = {"q": "Why?", "a": {"text": "good"}, "b": {"text": "bad"}, "better": 0}
    with pytest.raises(DataError, match=r"holds 0: .* --winner-values first=1,second=2,tie=0"):
        read(row, columns)
    assert read(row, columns, winner_values="first=0,second=1,tie=-1,tie=x") == ("which_won", PAIR)
    with pytest.raises(RowFault) as fault:
        read({**row, "better": "X"}, columns, winner_values="first=0,second=1,tie=-1,tie=x")
    assert (fault.value.reason, fault.value.field) == ("tied", "winner")
    # 1 and 2 both among the first rows go without saying; 0 is a tie then
    options = settle_reading([{**row, "better": value} for value in (1, 0, 2)], parse_columns(columns))
    assert RowReader(options)({**row, "better": 2}).chosen == answer("bad")
    assert read({**WON[0][1], "preference": 1}, winner_values="first=2,second=1")[1].chosen == answer("bad")
    for values in ("first=true,second=false", "first=1,second=0"):  # a column of booleans
        assert read({**row, "better": True}, columns, winner_values=values) == ("which_won", PAIR)
        assert read({**row, "better": "False"}, columns, winner_values=values)[1].chosen == answer("bad")


def test_a_verdict_in_a_column_for_each_answer_is_not_read_by_halves() -> None:
    row = {"prompt": "Why?", "response_a": "good", "response_b": "bad"}
    row |= {
        "winner_model_a": 0,
        "winner_model_b": 0,
        "winner_tie": 1,
    }  # who reads the first alone takes the second for the winner
    with pytest.raises(DataError, match=r"(?s)winner_model_b, .*winner_tie, such as int 1 \(one column tells"):
        read(row, "first=response_a,second=response_b,winner=winner_model_a", winner_values="first=1,second=0")


def test_what_stands_beside_a_nested_prompt_is_used_named_or_refused() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"input": {"messages": [USER], "tools": tools, "parallel_tool_calls": True}}  # OpenAI's layout of preferences
    row |= {"preferred_output": [GOOD], "non_preferred_output": [BAD]}
    columns = "prompt=input.messages,chosen=preferred_output,rejected=non_preferred_output"
    with pytest.raises(DataError, match=r"input\.tools, such as list .*"):
        read(row, columns)
    assert read(row, columns, ignore_columns="input.tools") == ("messages", PAIR)
    options = settle_reading([row], parse_columns(columns + ",tools=input.tools"))
    assert options.unread == {"input.parallel_tool_calls"}
    assert RowReader(options)(row) == PAIR._replace(variables={"tools": tools})


@pytest.mark.parametrize("text", ["first=1", "first=1,second=1", "first=1,second=", "1,2", "best=1,second=2"])
def test_wrong_winner_values_are_an_error(text: str) -> None:
    with pytest.raises(DataError, match="--winner-values"):
        read({**WON[0][1], "preference": 1}, winner_values=text)


def test_a_prompt_of_a_which_won_row_keeps_its_input() -> None:
    row = {"instruction": "Why?", "input": "It is.", "output_1": "good", "output_2": "bad", "preference": "model_a"}
    columns = "prompt=instruction,first=output_1,second=output_2,winner=preference"
    assert read(row, columns)[1].prompt == (Turn("user", "Why?\nIt is."),)


TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}}
]


def test_tools_documents_and_template_arguments_are_variables() -> None:
    nulls = json.loads(json.dumps(TOOLS))
    nulls[0]["function"]["parameters"]["properties"]["b"] = None
    row = {"prompt": "Why?", "chosen": "good", "rejected": "bad", "documents": [{"title": "t", "text": "x"}]}
    row["chat_template_kwargs"] = {"enable_thinking": False, "tone": None}
    expected = {"tools": TOOLS, "documents": row["documents"], "enable_thinking": False}
    for tools in (TOOLS, nulls, json.dumps(TOOLS), [json.dumps(TOOLS[0])]):
        assert read({**row, "tools": tools})[1] == PAIR._replace(variables=expected)
    given = {**row, "tools": "[]", "documents": [], "chat_template_kwargs": '{"enable_thinking": true}'}
    assert read(given)[1].variables == {"enable_thinking": True}


@pytest.mark.parametrize(
    "beside",
    [
        {"tools": "f(a)"},
        {"tools": [7]},
        {"documents": ["text"]},
        {"chat_template_kwargs": [1]},
        {"chat_template_kwargs": {"messages": [USER]}},
        {"chat_template_kwargs": {"bos_token": "x"}},
    ],
)
def test_what_no_template_takes_is_refused(beside: dict[str, Any]) -> None:
    with pytest.raises(RowFault) as fault:
        read({"prompt": "Why?", "chosen": "good", "rejected": "bad", **beside})
    assert (fault.value.reason, fault.value.field) == ("malformed", next(iter(beside)))
