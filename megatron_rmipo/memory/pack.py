"""A pack as memory sees it.

Shape letters: T tokens of a pack, N scored tokens, L queries and K keys of a segment.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from megatron_rmipo.data.batches.padding import PaddedRows, Row


class Segment(NamedTuple):
    """Tokens that attend to each other, and to a prefix: a prompt with a response, or the other response behind that prompt.

    Attributes:
        queries: L, its own tokens.
        keys: K, those it attends to: its prefix and itself.
        number: how many of this size a pack holds; of a pack that is only thought of no whole number.
    """

    queries: int
    keys: int
    number: float = 1.0


@dataclasses.dataclass(frozen=True)
class PackSize:
    """The size of a pack, whole, whatever ranks share it along its tokens.

    Attributes:
        num_tokens: T, padding included.
        num_scored: N.
        segments: what attends to what; empty: one pair whose responses are as long as each other.
    """

    num_tokens: int
    num_scored: int
    segments: tuple[Segment, ...] = ()

    @classmethod
    def of_row(cls, row: Row) -> PackSize:
        """That of a row, packed or padded."""
        if isinstance(row, PaddedRows):
            rows, length = row.token_ids.shape
            return cls(row.num_tokens, row.num_scored, (Segment(length, length, rows),))
        segments = [Segment(length, prefix + length) for _, length, _, prefix in row.segments.tolist()]
        return cls(row.num_tokens, row.num_scored, tuple(segments))

    def scaled(self, num_tokens: int) -> PackSize:
        """A pack of so many tokens with segments like these."""
        ratio = num_tokens / max(self.num_tokens, 1)
        segments = tuple(one._replace(number=one.number * ratio) for one in self.segments)
        return PackSize(num_tokens, -int(-self.num_scored * ratio // 1), segments)

    @property
    def all_segments(self) -> tuple[Segment, ...]:
        """The segments, or those of the one pair that the pack is taken for."""
        if self.segments:
            return self.segments
        # The first response goes on where its prompt ends.
        response = self.num_scored // 2
        first = self.num_tokens - response
        return (Segment(first, first), Segment(response, first))
