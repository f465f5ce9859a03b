r"""Conversations written as one text, ``\n\nHuman: ...\n\nAssistant: ...``, as in Anthropic's HH."""

from __future__ import annotations

import re

from megatron_rmipo.data.layouts.conversations import one_prompt
from megatron_rmipo.data.reading.rows import PreferencePair, Row, RowFault, Turn, answer, shown, text_of

HUMAN_MARK, ASSISTANT_MARK = "\n\nHuman:", "\n\nAssistant:"
_MARKS = re.compile("\n\n(Human|Assistant):")
_MARK_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(text: object, *, is_prompt: bool = False) -> bool:
    """Whether a text is a transcript; that of a prompt column has to start as one."""
    if not isinstance(text, str) or ASSISTANT_MARK not in text:
        return False
    return text.startswith((HUMAN_MARK, HUMAN_MARK.lstrip())) or (not is_prompt and HUMAN_MARK in text)


def parse_hh(row: Row) -> PreferencePair:
    """Anthropic-HH transcripts; with a prompt column it holds the transcript and chosen and rejected the answers alone."""
    if row.get("prompt") is not None:
        prompt = transcript_prompt(text_of(row, "prompt"), "prompt")
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
    return PreferencePair(one_prompt(chosen[:-1], rejected[:-1]), chosen[-1], rejected[-1])


def transcript_prompt(text: str, field: str) -> tuple[Turn, ...]:
    """The turns of a transcript that an answer follows, whether or not it ends with the answer's mark."""
    turns = transcript_turns(text, field)
    return turns[:-1] if turns[-1] == Turn("assistant", "") else turns


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
