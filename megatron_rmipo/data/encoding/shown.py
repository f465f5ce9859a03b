"""Whether a template shows all that a row holds: turns, calls, reasoning, tools, documents.

A mark is put behind every text of the row, and the conversation is rendered: where a mark is missing, the model would never see
that text. What a template shows depends on the form of a conversation, so that each form is tried once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from megatron_rmipo.data.encoding.chat import REASONING_FIELDS, ChatTemplate, switches
from megatron_rmipo.data.reading.rows import NOTHING, PreferencePair, RowFault, Turn, answer

# They tell which result belongs to which call. Templates that go by the order of the turns need neither.
_LINKING_FIELDS = ("name", "tool_call_id")
_MARK = re.compile(r"qzj(\d+)jzq")  # letters no template writes itself
_MOST_FORMS = 10_000


class _Place(NamedTuple):
    """A text in a conversation: its turn by number (None: beside the turns), and what it is there."""

    turn: int | None
    what: str


class _Marker:
    """Marks texts, and remembers where."""

    def __init__(self) -> None:
        self.places: list[_Place] = []

    def mark(self, turn: int | None, what: str) -> str:
        """A new mark for a text at this place."""
        self.places.append(_Place(turn, what))
        return f"qzj{len(self.places) - 1}jzq"

    def missing(self, text: str) -> frozenset[_Place]:
        """The places whose marks the text does not hold."""
        found = {int(number) for number in _MARK.findall(text)}
        return frozenset(place for number, place in enumerate(self.places) if number not in found)


class ShownCheck:
    """Finds what a template would leave out of a pair.

    Args:
        template: the template.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._source = template.source + (template.tool_source or "")
        self._shown_whole: set[tuple[str, ...]] = set()  # roles of prompts of plain text, which are shown whole
        self._known: dict[object, frozenset[_Place]] = {}

    def check(self, pair: PreferencePair) -> bool:
        """Refuse a pair of which something would be left out.

        Returns:
            Whether reasoning of earlier turns is left out, as many templates do by design: at inference the model does not see
            it either.

        Raises:
            RowFault: the template leaves out something else.
        """
        missing: set[_Place] = set()
        responses = pair.responses
        plain = not pair.variables and not any(turn.fields or not turn.content for turn in (*pair.prompt, *responses.values()))
        if plain and (roles := tuple([turn.role for turn in pair.prompt])) in self._shown_whole:
            return False
        for field, response in responses.items():
            turns = (*pair.prompt, response)
            self._refuse_unnamed(turns, pair.variables, field)
            if self._template.answer is not None:
                continue  # what a built-in template knows, it shows; a turn of another kind it refuses
            key = (tuple(map(_form, turns)), tuple(switches(pair.variables)))
            if (left_out := self._known.get(key)) is None:
                left_out = self._left_out(turns, pair.variables)
                if len(self._known) < _MOST_FORMS:
                    self._known[key] = left_out
            missing |= {place for place in left_out if place.turn is not None and place.what in REASONING_FIELDS}
            for place in left_out - missing:
                raise self._fault(place, len(pair.prompt), field)
            for place in missing:
                if place.turn == len(pair.prompt) or not self._shows_reasoning(place.what):
                    raise self._fault(place, len(pair.prompt), field)
        if plain and len(self._shown_whole) < _MOST_FORMS:
            self._shown_whole.add(roles)
        return bool(missing)

    def _left_out(self, turns: Sequence[Turn], variables: Mapping[str, Any]) -> frozenset[_Place]:
        marker = _Marker()
        marked = [_marked_turn(turn, number, marker) for number, turn in enumerate(turns)]
        beside = {name: _marked_variable(name, value, marker) for name, value in variables.items()}
        return marker.missing(self._template.render(marked, beside, add_generation_prompt=False))

    def _shows_reasoning(self, name: str) -> bool:
        """Whether it shows the reasoning of an answer, if of no earlier turn."""
        turn = answer("a")._replace(fields={name: "b"})
        key = ("reasoning", name)
        if key not in self._known:
            self._known[key] = self._left_out((Turn("user", "c"), turn), NOTHING)
        return not self._known[key]

    def _refuse_unnamed(self, turns: Sequence[Turn], variables: Mapping[str, Any], field: str) -> None:
        """Refuse fields and variables whose names do not occur in the template."""
        for name, value in variables.items():
            if _is_there(value) and name not in self._template.variables_read:
                raise self._fault(_Place(None, name), 0, field)
        for number, turn in enumerate(turns):
            for name, value in turn.fields.items():
                named = REASONING_FIELDS if name in REASONING_FIELDS else (name,)
                if name in _LINKING_FIELDS or not _is_there(value) or any(n in self._source for n in named):
                    continue
                raise self._fault(_Place(number, name), len(turns) - 1, field)

    def _fault(self, place: _Place, num_prompt_turns: int, field: str) -> RowFault:
        name = place.what
        if place.turn is None:
            field, where = place.what, "the row's"
            name = name if name in ("tools", "documents") else "chat_template_kwargs"
        elif place.turn == num_prompt_turns:
            where = "the answer's"
        else:
            field, where = "prompt", f"turn {place.turn + 1}'s"
        remedy = "" if name in ("content", "tool_calls") else f"; --ignore-columns {name} leaves it out on purpose"
        return RowFault("template", field, f"{self._template.title} leaves out {where} {place.what}{remedy}")


def _is_there(value: object) -> bool:
    return value is not None and value not in ("", [], {}, ())


def _form(turn: Turn) -> object:
    """What of a turn may decide how a template shows it."""
    if not turn.fields:
        return turn.role if turn.content else (turn.role,)
    calls = turn.fields.get("tool_calls")
    return turn.role, not turn.content, *turn.fields, len(calls) if isinstance(calls, list) else 0


def _marked_turn(turn: Turn, number: int, marker: _Marker) -> Turn:
    fields: dict[str, Any] = {}
    reasoning = ""  # one mark: a template reads one of the names
    for name, value in turn.fields.items():
        if name in REASONING_FIELDS and isinstance(value, str) and value:
            reasoning = reasoning or marker.mark(number, name)
            fields[name] = value + reasoning
        elif name == "tool_calls" and isinstance(value, list | tuple):
            fields[name] = [_marked_call(call, number, marker) for call in value]
        elif name not in _LINKING_FIELDS and isinstance(value, str) and value:
            fields[name] = value + marker.mark(number, name)
        else:
            fields[name] = value
    return Turn(turn.role, turn.content and turn.content + marker.mark(number, "content"), fields)


def _marked_call(call: Any, number: int, marker: _Marker) -> Any:
    """A call with its name and its arguments marked: plain, or under ``function``."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _marked_call(call["function"], number, marker)}
    marked = dict(call)
    for name, value in call.items():
        if name in ("name", "arguments") and isinstance(value, str):
            marked[name] = value + marker.mark(number, "tool_calls")
        elif name == "arguments" and isinstance(value, Mapping) and value:
            marked[name] = {**value, "q": marker.mark(number, "tool_calls")}
    return marked


def _marked_variable(name: str, value: Any, marker: _Marker) -> Any:
    """Tools with their names marked, documents with all their texts."""
    if not isinstance(value, list | tuple):
        return value
    if name == "tools":
        return [_with_name_marked(tool, marker) for tool in value]
    if name == "documents":
        return [_with_texts_marked(document, marker.mark(None, name)) for document in value]
    return value


def _with_name_marked(tool: Any, marker: _Marker) -> Any:
    if not isinstance(tool, Mapping):
        return tool
    if isinstance(tool.get("function"), Mapping):
        return {**tool, "function": _with_name_marked(tool["function"], marker)}
    return {**tool, "name": f"{tool.get('name', '')}{marker.mark(None, 'tools')}"}


def _with_texts_marked(document: Any, mark: str) -> Any:
    if not isinstance(document, Mapping):
        return document
    return {name: text + mark if isinstance(text, str) else text for name, text in document.items()}


def strings_in(value: Any) -> Iterator[str]:
    """Every text in a value of nested lists and mappings, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from strings_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_in(item)
