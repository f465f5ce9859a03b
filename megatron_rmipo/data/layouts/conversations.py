"""Turns out of the columns that hold them, and the one prompt that several columns of a row tell.

A row may tell its prompt more than once: in a prompt column, in a conversation, before the chosen and before the rejected answer.
Two tellings are of one prompt, by one rule, where their turns are the same but for

- white space around a turn's text: that of the telling nearest to the answer counts;
- a system turn at the beginning, which only one of them has: it counts;
- turns at the beginning, or at the end, which only one of them has: they count.

A telling that starts with the user's next turn goes on where another ends with the assistant's. All else is a
``prompt_mismatch``. So no turn is ever there twice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_rmipo.data.layouts.messages import holds_messages, is_empty, turn_of, written_messages
from megatron_rmipo.data.reading.rows import Row, RowFault, Turn, answer, shown, text_of, value_of

Turns = tuple[Turn, ...]
_MARKS = re.compile(r"\s*<extra_id_[01]>(System|User|Assistant)(?:\n|$)")
_END = "<extra_id_1>"  # which NeMo's answers end with
_ROUND = {"input", "output"}
INSTRUCTIONS = ("instruction", "question", "query", "input")


def turns_of(value: object, field: str) -> Turns:
    """The turns of a list of messages, or of rounds with ``input`` and ``output`` (Capybara), or of the JSON text of one.

    Raises:
        RowFault: it is something else, or a message cannot be used.
    """
    value = written_messages(value, field)
    if not isinstance(value, list):
        raise RowFault("not_text", field, f"a list of messages expected, found {shown(value)}")
    if value and all(isinstance(item, dict) and item.keys() == _ROUND for item in value):
        return history_of([[item[key] for key in ("input", "output")] for item in value], field)
    return tuple([turn_of(message, field) for message in value])


def answer_of(value: object, field: str) -> tuple[Turns, Turn]:
    """Split a response given as text, one message, or messages whose last is the assistant's, into (turns before, answer).

    Raises:
        RowFault: no turn of the assistant ends it, or a message cannot be used.
    """
    value = written_messages(value, field)
    if isinstance(value, str):
        return (), answer(value[: -len(_END)].rstrip("\n") if value.endswith(_END) else value)
    turns = (turn_of(value, field),) if isinstance(value, dict) else turns_of(value, field)
    if not turns:
        raise RowFault("empty_response", field, "an empty list of messages")
    if turns[-1].role != "assistant":
        raise RowFault("bad_turns", field, f"the last message is the {turns[-1].role}'s, not the assistant's")
    return turns[:-1], turns[-1]


def prompt_of(value: object, field: str) -> Turns:
    """A prompt given as text, which is one turn of the user (or several, with NeMo's and HelpSteer's marks), or as messages."""
    value = written_messages(value, field)
    if not isinstance(value, str):
        return turns_of([value] if isinstance(value, dict) else value, field)
    if "<extra_id_1>" not in value:
        return (Turn("user", value),)
    first, *marked = _MARKS.split(value)
    turns = [Turn(name.lower(), text) for name, text in zip(marked[::2], marked[1::2], strict=True)]
    if turns and turns[-1] == answer(""):  # the mark that the answer follows
        del turns[-1]
    return (Turn("user", first), *turns) if first.strip() else tuple(turns)


def history_of(value: object, field: str) -> Turns:
    """Rounds of a conversation, as a list of [what the user said, what the assistant answered].

    Raises:
        RowFault: it is something else.
    """
    turns: list[Turn] = []
    for round_ in value if isinstance(value, list) else [value]:
        if not isinstance(round_, list | tuple) or len(round_) != 2 or not all(isinstance(text, str) for text in round_):
            raise RowFault("not_text", field, f"a list of [question, answer] expected, found {shown(round_)}")
        turns += [Turn("user", round_[0]), answer(round_[1])]
    return tuple(turns)


def prompt_given(row: Row, names: Sequence[str]) -> tuple[str, Turns]:
    """(which of the columns tells the prompt, its turns).

    Text comes after the rounds of ``history``, and has the text of ``input`` on its next line, as in the Alpaca layout.

    Raises:
        RowFault: none of the columns is there, or two are.
    """
    there = [name for name in names if not is_empty(row.get(name))]
    name = there[0] if there else next((name for name in names if row.get(name) is not None), names[0])
    if second := next((other for other in there[1:] if other != "input" and row[other] != row[name]), None):
        message = f"the row has a prompt in {name} and another in {second}; --ignore-columns {second} leaves that out"
        raise RowFault("unread", second, message)
    given = value_of(row, name)
    more = "input" if name != "input" and not is_empty(row.get("input")) else None
    if holds_messages(given):
        if more or not is_empty(row.get("history")):
            raise RowFault("unread", more or "history", f"it stands beside messages in {name}, and has no place among them")
        return name, prompt_of(given, name)
    text = text_of(row, name)
    before = () if row.get("history") is None else history_of(row["history"], "history")
    return name, (*before, *prompt_of(f"{text}\n{text_of(row, more)}" if more else text, name))


def one_prompt(chosen: Turns, rejected: Turns) -> Turns:
    """The turns before both answers; an answer that has none before it answers the other's.

    Raises:
        RowFault: they are not the same.
    """
    if chosen == rejected or not rejected:
        return chosen
    if not chosen:
        return rejected
    (system, body), (other_system, other_body) = _parted(chosen), _parted(rejected)
    if len(body) != len(other_body):
        detail = f"{len(body)} turns before the chosen answer, {len(other_body)} before the rejected one"
        raise RowFault("prompt_mismatch", "rejected", detail)
    for number, (turn, other) in enumerate(zip(body, other_body, strict=True), start=1):
        if not same_turn(turn, other):
            raise RowFault("prompt_mismatch", "rejected", f"turn {number} is {_both(turn, other)}")
    return (*_one_system(system, other_system, "rejected"), *body)


def told_twice(given: Turns, before: Turns, field: str) -> Turns:
    """The prompt of two tellings, by the rule at the top.

    Args:
        given: that of a column of its own.
        before: that nearest to the answer.
        field: the column of ``given``.

    Raises:
        RowFault: they tell different prompts.
    """
    if not before:
        return given
    if not given or given == before[: len(given)]:
        return before
    (system, body), (near_system, near) = _parted(given), _parted(before)
    heads = _one_system(near_system, system, field)
    if not near or not body:
        return (*heads, *body, *near)
    if len(near) >= len(body):
        if _all_same(body, near[: len(body)]) or _all_same(body, near[-len(body) :]):
            return (*heads, *near)
    elif _all_same(near, body[-len(near) :]):
        return (*heads, *body[: -len(near)], *near)
    elif _all_same(near, body[: len(near)]):
        return (*heads, *near, *body[len(near) :])
    goes_on = body[-1].role == "assistant" and near[0].role == "user"
    if goes_on and not any(same_turn(near[0], turn) for turn in body):
        return (*heads, *body, *near)
    turn, other = next(((a, b) for a, b in zip(body, near, strict=False) if not same_turn(a, b)), (body[-1], near[-1]))
    remedy = f"; --ignore-columns {field} takes the conversation alone" if field == "prompt" else ""
    raise RowFault("prompt_mismatch", field, f"it and the messages before the answer differ: {_both(turn, other)}{remedy}")


def without_answer(turns: Turns, response: Turn) -> Turns:
    """A conversation without its last turn where that is the answer."""
    return turns[:-1] if turns and same_turn(turns[-1], response) else turns


def with_system(turns: Turns, row: Row) -> Turns:
    """The turns behind the system turn of a row's ``system`` column.

    Raises:
        RowFault: it is not text, or the turns have another system turn.
    """
    text = text_of(row, "system")
    return told_twice((Turn("system", text),), turns, "system") if text.strip() else turns


def same_turn(one: Turn, other: Turn) -> bool:
    """Whether two turns are the same but for white space around their text."""
    return one == other or (
        one.role == other.role and one.content.strip() == other.content.strip() and one.fields == other.fields
    )


def _all_same(ones: Sequence[Turn], others: Sequence[Turn]) -> bool:
    return len(ones) == len(others) and all(map(same_turn, ones, others))


def _parted(turns: Turns) -> tuple[Turns, Turns]:
    """(the system turn at the beginning, if any, and the others); a system turn without text is none."""
    if turns and turns[0].role == "system":
        return turns[:1] if turns[0].content.strip() else (), turns[1:]
    return (), turns


def _one_system(near: Turns, other: Turns, field: str) -> Turns:
    if near and other and not same_turn(near[0], other[0]):
        raise RowFault("prompt_mismatch", field, f"two system turns: {_both(other[0], near[0])}")
    return near or other


def _both(one: Turn, other: Turn) -> str:
    """Two turns that differ, each shown by what differs."""
    if one.role != other.role:
        return f"the {one.role}'s {shown(one.content)} and the {other.role}'s {shown(other.content)}"
    if one.content.strip() != other.content.strip():
        return f"{shown(one.content)} and {shown(other.content)}"
    return f"{shown(dict(one.fields))} and {shown(dict(other.fields))}"
