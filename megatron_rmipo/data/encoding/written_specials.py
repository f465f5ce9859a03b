r"""Control tokens that users wrote into a row, encoded as the ordinary text they are.

While the conversation is rendered, a private-use character stands for each; then the rendered text is encoded piece by piece. So
only the chat template can start a turn or end a response.

Control tokens are the special tokens, and of the other added tokens those that the template writes and no text is likely to hold
(``<|im_end|>`` as some checkpoints ship it, but not ``\n``). An assistant's turn may hold those that do not begin or end a turn:
``<think>`` and ``<tool_call>`` are what the model writes there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from megatron_rmipo.data.encoding.backends import Backend
from megatron_rmipo.data.encoding.chat import ChatTemplate
from megatron_rmipo.data.encoding.jinja import literal_text
from megatron_rmipo.data.encoding.shown import strings_in
from megatron_rmipo.data.reading.rows import PreferencePair, RowFault, Turn, answer

_STAND_IN_BASES = (0xF0000, 0x100000)  # the two supplementary private-use areas of Unicode
_MARKUP = re.compile(r"[^\w\s].+[^\w\s]", re.DOTALL)


def is_markup(token: str) -> bool:
    """Whether an added token looks like no word and no white space: ``<|im_end|>``, ``[INST]``, ``<think>``."""
    return _MARKUP.fullmatch(token) is not None


class WrittenSpecials:
    """Finds control tokens in what users wrote.

    Args:
        backend: the tokenizer.
        template: the chat template.
        named: further added tokens that no user may write.
    """

    def __init__(self, backend: Backend, template: ChatTemplate, named: Iterable[str] = ()) -> None:
        self.backend, self._template = backend, template
        literals = literal_text(template.source) + literal_text(template.tool_source or "")
        markup = {token for token in backend.added_ids if is_markup(token)}
        around, between = _plain_turns(template)
        self._bounds = {token for token in markup if token in around}
        marks = {token for token in markup if token in around or token in between}
        self._never = {*backend.special_ids, *marks, *(set(named) & set(backend.added_ids))}
        self.tokens = sorted(self._never | {token for token in markup if token in literals}, key=len, reverse=True)
        self._any, self._in_answers = _pattern(self.tokens), _pattern(self.of_answers(self.tokens))

    def of_answers(self, tokens: Iterable[str]) -> list[str]:
        """Those of the tokens that an assistant's turn may not hold either."""
        return [token for token in tokens if token in self._never]

    def in_pair(self, pair: PreferencePair) -> bool:
        """Whether any text of the pair holds one."""
        return (
            self.in_turns(pair.prompt)
            or self.in_turns(pair.responses.values())
            or (bool(pair.variables) and any(map(self._any.search, strings_in(pair.variables))))
        )

    def in_turns(self, turns: Iterable[Turn]) -> bool:
        """Whether any turn holds one."""
        for role, content, fields in turns:
            pattern = self._in_answers if role == "assistant" else self._any
            if pattern.search(content) or (fields and any(map(pattern.search, strings_in(fields)))):
                return True
        return False

    def stand_ins(self, pair: PreferencePair) -> StandIns:
        """What hides the control tokens of a pair.

        A token that the template acts upon, as some do on ``</think>`` in an answer, is left to it.

        Raises:
            RowFault: the texts use the characters that would stand in, or the template acts upon a token that ends turns.
        """
        texts = list(strings_in([[turn.content, turn.fields] for turn in (*pair.prompt, *pair.responses.values())]))
        texts += strings_in(pair.variables)
        written = {token for text in texts for token in self._any.findall(text)}
        base = _free_base(texts, len(self.tokens))
        true = self._template.render_row(pair)
        every = StandIns(self, base, written)
        if self._shows(every, pair, true):
            return every
        acted_on = {token for token in written if not self._shows(StandIns(self, base, {token}), pair, true)}
        others = StandIns(self, base, written - acted_on)
        if acted_on & self._bounds or not self._shows(others, pair, true):
            tokens = ", ".join(sorted(acted_on or written))
            raise RowFault("special_token", "", f"{self._template.title} acts upon {tokens} in the row's text")
        return others

    def _shows(self, stand_ins: StandIns, pair: PreferencePair, true: tuple[str, list[str]]) -> bool:
        """Whether the pair is rendered the same with stand-ins and without."""
        try:
            prompt, responses = self._template.render_row(stand_ins.hide_pair(pair))
        except RowFault:  # not with them
            return False
        return (stand_ins.show(prompt), [stand_ins.show(text) for text in responses]) == true

    def without_trailing(self, text: str, ids: set[int]) -> str:
        """The text without tokens of the given ids, and the white space around them, at its end."""
        ends = tuple(token for token, index in self.backend.added_ids.items() if index in ids)
        while ends and text.rstrip().endswith(ends):
            shorter = text.rstrip()
            text = shorter.removesuffix(next(end for end in ends if shorter.endswith(end))).rstrip()
        return text


class StandIns:
    """Hides control tokens, and encodes a text that holds stand-ins.

    Args:
        written: which control tokens there are.
        base: the character that stands for the first of them.
        tokens: those to hide.
    """

    def __init__(self, written: WrittenSpecials, base: int, tokens: set[str]) -> None:
        self._backend, self._tokens, self._base = written.backend, written.tokens, base
        hidden = [token for token in self._tokens if token in tokens]
        self._any, self._in_answers = _pattern(hidden), _pattern(written.of_answers(hidden))
        self._stand_in = re.compile(f"([{chr(base)}-{chr(base + max(0, len(self._tokens) - 1))}])")

    def hide_pair(self, pair: PreferencePair) -> PreferencePair:
        """The pair with a stand-in for each token."""
        chosen, rejected = pair.in_place(self.hide_turns(pair.responses.values()))
        variables = _map_strings(pair.variables, self._hide_any)
        return pair._replace(prompt=self.hide_turns(pair.prompt), chosen=chosen, rejected=rejected, variables=variables)

    def hide_turns(self, turns: Iterable[Turn]) -> tuple[Turn, ...]:
        """The turns with stand-ins."""
        hidden = []
        for turn in turns:
            hide = self._hide_in_answer if turn.role == "assistant" else self._hide_any
            hidden.append(Turn(turn.role, hide(turn.content), _map_strings(turn.fields, hide)))
        return tuple(hidden)

    def show(self, text: str) -> str:
        """The text with each token in the place of its stand-in."""
        return self._stand_in.sub(lambda match: self._tokens[ord(match.group()) - self._base], text)

    def encode(self, text: str, *, first: bool) -> list[int]:
        """Ids of a rendered text with stand-ins; ``first``: it starts a sequence.

        Raises:
            RowFault: the tokenizer has no other way to write a token.
        """
        ids: list[int] = []
        for position, part in enumerate(self._stand_in.split(text)):
            if position % 2:
                token = self._tokens[ord(part) - self._base]
                as_text = self._backend.plain([token])[0]
                if self._backend.added_ids[token] in as_text:
                    raise RowFault("special_token", "", f"the tokenizer has no way to write {token} as text")
                ids += as_text
            elif part:
                encode = self._backend.first if first and position == 0 else self._backend.continuation
                ids += encode([part])[0]
        return ids

    def _hide_any(self, text: str) -> str:
        return self._any.sub(self._character, text)

    def _hide_in_answer(self, text: str) -> str:
        return self._in_answers.sub(self._character, text)

    def _character(self, match: re.Match[str]) -> str:
        return chr(self._base + self._tokens.index(match.group()))


def _pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """What finds the tokens, given with longer ones first."""
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def _plain_turns(template: ChatTemplate) -> tuple[str, str]:
    """What a template writes around a plain question and behind its answer; and in a conversation that goes on."""
    if template.verbatim:
        return "", ""
    turns = (Turn("user", "x"), answer("y"), Turn("user", "z"))
    around = f"{template.render(turns[:1], add_generation_prompt=False)}\0{template.closing}"
    try:
        return around, template.render(turns, add_generation_prompt=False)
    except RowFault:  # one question is all it takes
        return around, ""


def _free_base(texts: Iterable[str], count: int) -> int:
    """The first of a range of stand-in characters that the texts do not use."""
    used = {ord(char) for text in texts for char in text if ord(char) >= _STAND_IN_BASES[0]}
    for base in _STAND_IN_BASES:
        if used.isdisjoint(range(base, base + count)):
            return base
    raise RowFault("malformed", "", "special tokens beside characters of both supplementary private-use areas")


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A value of nested lists and mappings with every text changed, keys left alone."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _map_strings(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value
