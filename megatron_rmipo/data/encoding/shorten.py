"""Making a prompt fit: oldest turns go first, then the beginning of the last user turn's text.

The conversation is rendered anew each time, so BOS, the system turn and the template's own text stay whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_rmipo.data.reading.rows import Turn

_SLACK_TOKENS = 2
_MAX_CUTS = 12

EncodePrompt = Callable[[Sequence[Turn]], list[int]]


def shorten_prompt(prompt: tuple[Turn, ...], room: int, encode: EncodePrompt) -> list[int] | None:
    """Ids of the longest shortened prompt found.

    Args:
        prompt: the turns; whole they are known not to fit.
        room: most tokens.
        encode: turns -> ids of the rendered prompt.

    Returns:
        At most ``room`` ids, or None where even the shortest form is longer.
    """
    system = prompt[:1] if prompt[0].role == "system" else ()
    turns = prompt[len(system) :]
    starts = [index for index, turn in enumerate(turns) if turn.role == "user"] or [0]
    too_early, fits = 0, len(starts)  # numbers of user turns to start from
    best: list[int] | None = None
    while fits - too_early > 1:
        middle = (too_early + fits) // 2
        ids = encode((*system, *turns[starts[middle] :]))
        if len(ids) <= room:
            best, fits = ids, middle
        else:
            too_early = middle
    return best if best is not None else _cut_text(system, turns[starts[-1] :], room, encode)


def _cut_text(system: tuple[Turn, ...], turns: tuple[Turn, ...], room: int, encode: EncodePrompt) -> list[int] | None:
    """Keep as many of the last characters of the first turn's text as fit, found by interpolation and bisection."""
    text = turns[0].content
    fits, too_many = 0, len(text)  # characters kept
    best: list[int] | None = None
    whole = len(encode((*system, *turns)))
    keep = max(0, int(len(text) * (1 - (whole - room) / whole)))
    for _ in range(_MAX_CUTS):
        if not fits < keep < too_many:
            keep = (fits + too_many) // 2
            if keep == fits:
                break
        ids = encode((*system, turns[0]._replace(content=text[len(text) - keep :]), *turns[1:]))
        if len(ids) <= room:
            best, fits = ids, keep
            if len(ids) >= room - _SLACK_TOKENS:
                break
        else:
            too_many = keep
        keep += int((room - len(ids)) * len(text) / whole)
    return best
