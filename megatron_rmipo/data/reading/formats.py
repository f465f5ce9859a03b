r"""The formats of preference data sets, paired and unpaired, and of supervised ones.

Each is one function from a row (column -> value) to a :class:`PreferencePair`.

:data:`FORMATS` lists them; :func:`recognise_format` chooses one by looking at rows.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterable, Sequence

from megatron_rmipo.data.reading.rows import PreferencePair, Row, RowFault, Turn, answer, shown, text_of, value_of
from megatron_rmipo.errors import DataError

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
HUMAN_MARK, ASSISTANT_MARK = "\n\nHuman:", "\n\nAssistant:"
_MARKS = re.compile("\n\n(Human|Assistant):")
_ANSWER_COLUMNS = ("messages", "completion", "response")
_MARK_ROLES = {"Human": "user", "Assistant": "assistant"}


def _turn(message: object, field: str) -> Turn:
    """A message in OpenAI's (role, content) or ShareGPT's (from, value) spelling."""
    if not isinstance(message, dict):
        raise RowFault("not_text", field, f"a message with role and content expected, found {shown(message)}")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise RowFault("malformed", field, f"a message has the role {role!r}; known: {', '.join(ROLES)}")
    if isinstance(content, list):  # a list of typed parts, text alone
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise RowFault("not_text", field, f"a message has parts other than text: {shown(content)}")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RowFault("not_text", field, f"the {role} message's content is {shown(content)}")
    return Turn(ROLES[role], content)


def _turns(value: object, field: str) -> tuple[Turn, ...]:
    if not isinstance(value, list):
        raise RowFault("not_text", field, f"a list of messages expected, found {shown(value)}")
    return tuple(_turn(message, field) for message in value)


def _answer(value: object, field: str) -> tuple[tuple[Turn, ...], Turn]:
    """Split a response given as text, one message, or messages whose last is the assistant's, into (turns before, answer)."""
    if isinstance(value, str):
        return (), answer(value)
    turns = (_turn(value, field),) if isinstance(value, dict) else _turns(value, field)
    if not turns:
        raise RowFault("empty_response", field, "an empty list of messages")
    if turns[-1].role != "assistant":
        raise RowFault("bad_turns", field, f"the last message is the {turns[-1].role}'s, not the assistant's")
    return turns[:-1], turns[-1]


def _with_system(row: Row, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    system = row.get("system")
    if isinstance(system, str) and system.strip() and not (turns and turns[0].role == "system"):
        return (Turn("system", system), *turns)
    return turns


def parse_strings(row: Row) -> PreferencePair:
    """Columns prompt, chosen and rejected as text; the prompt is one user turn."""
    prompt = text_of(row, "prompt")
    chosen, rejected = answer(text_of(row, "chosen")), answer(text_of(row, "rejected"))
    return PreferencePair(_with_system(row, (Turn("user", prompt),)), chosen, rejected)


def parse_messages(row: Row) -> PreferencePair:
    """Columns chosen and rejected as message lists that end with the answer, with or without a prompt column.

    With a list of messages as prompt, the lists may repeat it or hold the answer alone; with a text as prompt (as in
    UltraFeedback-binarized) and whole conversations beside it, the conversations count.
    """
    before_chosen, chosen = _answer(value_of(row, "chosen"), "chosen")
    before_rejected, rejected = _answer(value_of(row, "rejected"), "rejected")
    _require_same_prompt(before_chosen, before_rejected)
    return PreferencePair(_with_system(row, _whole_prompt(row, before_chosen)), chosen, rejected)


def _whole_prompt(row: Row, before: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The prompt of the prompt column (text, messages or absent) and of the messages before the answer."""
    prompt = row.get("prompt")
    given = () if prompt is None else (Turn("user", prompt),) if isinstance(prompt, str) else _turns(prompt, "prompt")
    if not isinstance(prompt, str) and before[: len(given)] != given:
        before = given + before
    elif not before:
        before = given
    if not before:
        raise RowFault("missing_field", "prompt", "no prompt column, and no messages before the answer")
    return before


def parse_supervised(row: Row) -> PreferencePair:
    """One answer: column messages, whose last is the answer (as in UltraChat), or prompt with completion or response.

    Only the last answer of a conversation is one to learn; earlier ones belong to the prompt.
    """
    field = next((name for name in _ANSWER_COLUMNS if row.get(name) is not None), "messages")
    given = value_of(row, field)
    if field == "messages" and not isinstance(given, list):
        raise RowFault("not_text", field, f"a list of messages expected, found {shown(given)}")
    before, response = _answer(given, field)
    return PreferencePair(_with_system(row, _whole_prompt(row, before)), response, None)


def parse_unpaired(row: Row) -> PreferencePair:
    """One answer as in :func:`parse_supervised`, and a column label: true makes it the chosen, false the rejected answer.

    The integers 1 and 0 are taken for true and false.
    """
    label = value_of(row, "label")
    if not isinstance(label, int) or label not in (0, 1):
        raise RowFault("bad_label", "label", f"true or false expected (or 1 or 0), found {shown(label)}")
    pair = parse_supervised(row)
    return pair if label else PreferencePair(pair.prompt, None, pair.chosen)


def parse_sharegpt(row: Row) -> PreferencePair:
    """Column conversations (from/value or role/content messages), answers in chosen and rejected."""
    turns = _turns(value_of(row, "conversations"), "conversations")
    before_chosen, chosen = _answer(value_of(row, "chosen"), "chosen")
    before_rejected, rejected = _answer(value_of(row, "rejected"), "rejected")
    _require_same_prompt(before_chosen, before_rejected)
    if before_chosen and before_chosen[: len(turns)] != turns:
        raise RowFault("prompt_mismatch", "chosen", "the messages before the answer are not the conversation")
    return PreferencePair(_with_system(row, before_chosen or turns), chosen, rejected)


def parse_hh(row: Row) -> PreferencePair:
    """Anthropic-HH transcripts; with a prompt column it holds the transcript and chosen and rejected the answers alone."""
    if row.get("prompt") is not None:
        prompt = transcript_turns(text_of(row, "prompt"), "prompt")
        if prompt[-1] == Turn("assistant", ""):  # the transcript ends with the mark that the answer follows
            prompt = prompt[:-1]
        return PreferencePair(prompt, answer(text_of(row, "chosen").strip()), answer(text_of(row, "rejected").strip()))
    chosen_text = text_of(row, "chosen")
    chosen = transcript_turns(chosen_text, "chosen")
    rejected_text = text_of(row, "rejected")
    same = chosen_text[: chosen_text.rfind(ASSISTANT_MARK) + len(ASSISTANT_MARK)]
    if chosen[-1].role == "assistant" and rejected_text.startswith(same) and not _MARKS.search(rejected_text, len(same)):
        return PreferencePair(chosen[:-1], chosen[-1], answer(rejected_text[len(same) :].strip()))
    rejected = transcript_turns(rejected_text, "rejected")
    for field, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[-1].role != "assistant":
            raise RowFault("bad_turns", field, "the transcript ends with a Human turn, there is no answer")
    _require_same_prompt(chosen[:-1], rejected[:-1])
    return PreferencePair(chosen[:-1], chosen[-1], rejected[-1])


def transcript_turns(text: str, field: str) -> tuple[Turn, ...]:
    r"""Turns of ``\n\nHuman: ...\n\nAssistant: ...``; text before the first mark is a system turn.

    Raises:
        RowFault: there is no ``Human:`` mark.
    """
    if text.startswith(HUMAN_MARK.lstrip()):
        text = "\n\n" + text
    head, *parts = _MARKS.split(text)
    roles, contents = parts[::2], parts[1::2]
    if "Human" not in roles:
        raise RowFault("malformed", field, f"no {HUMAN_MARK!r} in the transcript {shown(text)}")
    turns = tuple([Turn(_MARK_ROLES[role], content.strip()) for role, content in zip(roles, contents, strict=True)])
    return (Turn("system", head.strip()), *turns) if head.strip() else turns


def _require_same_prompt(chosen: Sequence[Turn], rejected: Sequence[Turn]) -> None:
    if tuple(chosen) == tuple(rejected):
        return
    if len(chosen) != len(rejected):
        detail = f"{len(chosen)} turns before the chosen answer, {len(rejected)} before the rejected one"
    else:
        number = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=True)) if a != b)
        detail = f"turn {number + 1} is {shown(chosen[number].content)} and {shown(rejected[number].content)}"
    raise RowFault("prompt_mismatch", "rejected", detail)


FORMATS: dict[str, Callable[[Row], PreferencePair]] = {
    "strings": parse_strings,
    "messages": parse_messages,
    "hh": parse_hh,
    "sharegpt": parse_sharegpt,
    "supervised": parse_supervised,
    "unpaired": parse_unpaired,
}
_OF_ONE_ANSWER = ("supervised", "unpaired")


def refuse_mixed(row: Row, name: str) -> None:
    """Refuse a pair where rows have one answer, such a row among pairs, and a labelled row in a supervised data set.

    A row without a label in an unpaired data set lacks a column; :func:`parse_unpaired` says so.

    Args:
        row: columns under our names.
        name: the data set's format.

    Raises:
        RowFault: the row is of another kind.
    """
    has_pair = row.get("chosen") is not None and row.get("rejected") is not None
    of_one_answer = None if has_pair else _format_of_one_answer(row)
    if name in _OF_ONE_ANSWER and has_pair:
        also = " (the sft objective reads pairs too)" if name == "supervised" else ""
        raise RowFault("mixed", "rejected", f"a pair in {name} data; name its format with --format{also}")
    if name not in _OF_ONE_ANSWER and of_one_answer:
        raise RowFault("mixed", "chosen", "one answer alone, in data of pairs; preprocess such rows by themselves")
    if name == "supervised" and of_one_answer == "unpaired":
        message = f"an answer labelled {row['label']} in supervised data; use --format unpaired, or remove the column label"
        raise RowFault("mixed", "label", message)


def _format_of_one_answer(row: Row) -> str | None:
    """``unpaired`` where one answer has a label, ``supervised`` where it has none, None where there is no such answer."""
    has_prompt = row.get("prompt") is not None
    has_answer = has_prompt and any(row.get(name) is not None for name in ("completion", "response"))
    if row.get("chosen") is not None or not (has_answer or isinstance(row.get("messages"), list)):
        return None
    return "unpaired" if isinstance(row.get("label"), bool) else "supervised"


def recognise_format(rows: Iterable[Row]) -> str:
    """The format of the rows: ``supervised`` or ``unpaired`` where that is the commonest kind, else that of the first pair.

    Raises:
        DataError: no row shows one; names the columns found.
    """
    columns: list[str] = []
    of_pairs: list[str] = []
    of_one_answer: collections.Counter[str] = collections.Counter()
    for row in rows:
        columns = columns or list(row)
        if (name := _pair_format(row)) is not None:
            of_pairs.append(name)
        elif (name := _format_of_one_answer(row)) is not None:
            of_one_answer[name] += 1
    for name, count in of_one_answer.most_common(1):
        if count > len(of_pairs):
            return name
    if of_pairs:
        return of_pairs[0]
    raise DataError(
        f"the format of the rows is not recognised; their columns are: {', '.join(columns) or '(no rows)'}\n"
        f"Name it with --format ({', '.join(FORMATS)}), or name the columns with\n"
        "--columns prompt=COLUMN,chosen=COLUMN,rejected=COLUMN (supervised rows: prompt=COLUMN,response=COLUMN;\n"
        "unpaired rows: prompt=COLUMN,response=COLUMN,label=COLUMN)."
    )


def _pair_format(row: Row) -> str | None:
    chosen, prompt = row.get("chosen"), row.get("prompt")
    if chosen is None or row.get("rejected") is None:
        return None
    if row.get("conversations") is not None:
        return "sharegpt"
    if isinstance(prompt, str) and isinstance(chosen, str):
        return "hh" if prompt.startswith((HUMAN_MARK, HUMAN_MARK.lstrip())) and ASSISTANT_MARK in prompt else "strings"
    if isinstance(chosen, str) and prompt is None and HUMAN_MARK in "\n\n" + chosen and ASSISTANT_MARK in chosen:
        return "hh"
    if isinstance(chosen, dict | list) or isinstance(prompt, list):
        return "messages"
    return None
