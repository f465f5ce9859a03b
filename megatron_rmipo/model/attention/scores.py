"""What layers of some models do to the scores of their attention, before and in the softmax."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ScoreRules:
    """What happens to the scores of a layer before their softmax.

    Attributes:
        window: how many tokens, by position and itself among them, a token sees; None for all before it. Positions of a segment
            go on where those of its prefix end.
        softcap: scores s become ``cap * tanh(s / cap)``; None leaves them.
        sinks: each head has a learned score that takes its part of the softmax and gives nothing.
    """

    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


PLAIN = ScoreRules()
