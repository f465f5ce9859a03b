"""Special tokens that users wrote into a turn, encoded as the ordinary text they are.

While the conversation is rendered, a private-use character stands for each; then the rendered text is encoded piece by piece. So
only the chat template can start a turn or end a response.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from megatron_rmipo.data.encoding.backends import Backend
from megatron_rmipo.data.reading.rows import PreferencePair, RowFault, Turn

_STAND_IN_BASES = (0xF0000, 0x100000)  # the two supplementary private-use areas of Unicode


class WrittenSpecials:
    """Finds, hides and encodes special tokens in what users wrote."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._texts = sorted(backend.special_ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._texts)) or r"(?!)")

    def in_pair(self, pair: PreferencePair) -> bool:
        """Whether any text of the pair holds one."""
        return self.in_turns(pair.prompt) or self.in_turns(pair.responses.values())

    def in_turns(self, turns: Iterable[Turn]) -> bool:
        """Whether any turn holds one."""
        return any(map(self._pattern.search, [turn.content for turn in turns]))

    def free_base(self, texts: Iterable[str]) -> int:
        """The first of a range of stand-in characters that the texts do not use.

        Raises:
            RowFault: they use both ranges.
        """
        used = {ord(char) for text in texts for char in text if ord(char) >= _STAND_IN_BASES[0]}
        for base in _STAND_IN_BASES:
            if used.isdisjoint(range(base, base + len(self._texts))):
                return base
        raise RowFault("malformed", "", "special tokens beside characters of both supplementary private-use areas")

    def hide(self, text: str, base: int) -> str:
        """The text with a stand-in for each special token."""
        return self._pattern.sub(lambda match: chr(base + self._texts.index(match.group())), text)

    def hide_turns(self, turns: Iterable[Turn], base: int) -> tuple[Turn, ...]:
        """The turns with stand-ins."""
        return tuple(turn._replace(content=self.hide(turn.content, base)) for turn in turns)

    def encode(self, text: str, base: int, *, first: bool) -> list[int]:
        """Ids of a rendered text with stand-ins; ``first``: it starts a sequence."""
        ids: list[int] = []
        stand_ins = f"([{chr(base)}-{chr(base + len(self._texts) - 1)}])"
        for position, part in enumerate(re.split(stand_ins, text)):
            if position % 2:
                ids += self._backend.plain([self._texts[ord(part) - base]])[0]
            elif part:
                encode = self._backend.first if first and position == 0 else self._backend.continuation
                ids += encode([part])[0]
        return ids

    def without_trailing(self, text: str, ids: set[int]) -> str:
        """The text without special tokens of the given ids, and the white space around them, at its end."""
        ends = tuple(token for token, index in self._backend.special_ids.items() if index in ids)
        while ends and text.rstrip().endswith(ends):
            shorter = text.rstrip()
            text = shorter.removesuffix(next(end for end in ends if shorter.endswith(end))).rstrip()
        return text
