"""Held-out pairs as text, token by token, with what the model says of each: log-probs and mutual information with the prompt."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rmipo.data.encoding.tokenize import PreferenceTokenizer, load_tokenizer
from megatron_rmipo.errors import RmipoError
from megatron_rmipo.reports.held_out import Record
from megatron_rmipo.reports.page.token_record import LEAST, MOST

# Longer texts are cut; a note says where.
_MOST_TOKENS, _MOST_PROMPT_CHARACTERS = 320, 1500
# A token of a few bytes of one character is shown with those that complete it, so many at most.
_MOST_OF_ONE_CHARACTER = 6
# What a text decodes with depends on a few tokens before it.
_CONTEXT = 8
_NOT_WHOLE = "\ufffd"
# Beyond these a token counts as told by its prompt, or against it, and how strongly; in nats.
_PMI_STEPS = (0.5, 2.0)
# Log-probs of one in two, ten and a hundred: how surprising a token is.
_LOGP_STEPS = (math.log(0.5), math.log(0.1), math.log(0.01))
NUM_TELLING = 6


@dataclasses.dataclass(frozen=True)
class Piece:
    """A token, or several that make one character.

    Attributes:
        text: decoded.
        logp: behind the prompt.
        alone: without it; None where it was not scored.
    """

    text: str
    logp: float
    alone: float | None

    @property
    def pmi(self) -> float | None:
        """How much the prompt makes it likelier, in nats."""
        return None if self.alone is None else self.logp - self.alone

    @property
    def marks(self) -> str:
        """Classes of the page: ``p2`` to ``p1``, ``n1`` to ``n2`` by mutual information, ``s1`` to ``s3`` by surprise."""
        marks = []
        if self.pmi is not None and (strength := sum(abs(self.pmi) > step for step in _PMI_STEPS)):
            marks.append(f"{'p' if self.pmi > 0 else 'n'}{strength}")
        if surprise := sum(self.logp < step for step in _LOGP_STEPS):
            marks.append(f"s{surprise}")
        return " ".join(marks)


@dataclasses.dataclass(frozen=True)
class ShownResponse:
    """A response.

    Attributes:
        name: chosen or rejected.
        pieces: its beginning.
        num_tokens: of all of it.
        logp, alone: sums over all its tokens; ``alone`` over those that were scored.
        pmi: in sum, over the tokens that were scored without the prompt.
    """

    name: str
    pieces: Sequence[Piece]
    num_tokens: int
    logp: float
    alone: float | None
    pmi: float | None

    @property
    def num_shown(self) -> int:
        """Tokens of the text at most."""
        return min(self.num_tokens, _MOST_TOKENS)

    @property
    def telling(self) -> list[Piece]:
        """The pieces that the prompt changes most, most first."""
        known = [piece for piece in self.pieces if piece.pmi is not None]
        return sorted(known, key=lambda piece: -abs(piece.pmi or 0.0))[:NUM_TELLING]


@dataclasses.dataclass(frozen=True)
class ShownPair:
    """A held-out pair.

    Attributes:
        number: in stored order.
        prompt: its text, cut in its middle.
        responses: those that it has.
        values: what the last evaluation said of it.
    """

    number: int
    prompt: str
    responses: Sequence[ShownResponse]
    values: Record


def find_tokenizer(candidates: Sequence[str | None]) -> PreferenceTokenizer | None:
    """The first of these that can be loaded from a disk; nothing is downloaded for a report."""
    for name in candidates:
        if name and Path(name).exists():
            try:
                return load_tokenizer(name)
            except (RmipoError, OSError, ValueError):
                continue
    return None


def shown_pairs(
    tokens: Sequence[Record], last: Sequence[Record], tokenizer: PreferenceTokenizer | None
) -> dict[str, list[ShownPair]]:
    """The pairs of ``token_logps.jsonl``, by why they are shown.

    Args:
        tokens: its records.
        last: what the last evaluation said of each held-out pair.
        tokenizer: turns ids into text; without one the ids are shown.
    """
    decode = tokenizer.decode_continuation if tokenizer is not None else _as_numbers
    parts: dict[tuple[str, int], dict[str, Record]] = {}
    for record in tokens:
        parts.setdefault((record["why"], record["pair"]), {})[record["response"]] = record
    found: dict[str, list[ShownPair]] = {MOST: [], LEAST: []}
    for (why, number), texts in parts.items():
        prompt = texts["prompt"]["token_ids"] if "prompt" in texts else []
        responses = [_response(texts[name], prompt, decode) for name in ("chosen", "rejected") if name in texts]
        text = cut_middle(decode([], prompt).strip("\n"), _MOST_PROMPT_CHARACTERS)
        values: Mapping[str, Any] = last[number] if number < len(last) else {}
        found.setdefault(why, []).append(ShownPair(number, text, responses, values))
    return {why: pairs for why, pairs in found.items() if pairs}


def _as_numbers(before: Sequence[int], ids: Sequence[int]) -> str:
    return "".join(f"[{number}]" for number in ids)


def _response(record: Record, prompt: Sequence[int], decode: Callable[[Sequence[int], Sequence[int]], str]) -> ShownResponse:
    ids, logps, alone = record["token_ids"], record["logps"], record["alone"]
    scored = [(logp, other) for logp, other in zip(logps, alone, strict=True) if other is not None]
    return ShownResponse(
        name=record["response"],
        pieces=pieces_of(ids[:_MOST_TOKENS], logps, alone, prompt, decode),
        num_tokens=len(ids),
        logp=sum(logps),
        alone=sum(other for _, other in scored) if scored else None,
        pmi=sum(logp - other for logp, other in scored) if scored else None,
    )


def pieces_of(
    ids: Sequence[int],
    logps: Sequence[float],
    alone: Sequence[float | None],
    prompt: Sequence[int],
    decode: Callable[[Sequence[int], Sequence[int]], str],
) -> list[Piece]:
    """The text of each token behind what comes before it.

    Args:
        ids: of the response, or of its beginning.
        logps, alone: of its tokens, as :class:`Piece` has them.
        prompt: ids before it.
        decode: (ids before, ids) to text.
    """
    pieces = []
    before, waiting, first = list(prompt[-_CONTEXT:]), list[int](), 0
    for number, token in enumerate(ids):
        waiting.append(token)
        text = decode(before, waiting)
        is_last = number + 1 == len(ids) or len(waiting) == _MOST_OF_ONE_CHARACTER
        if text.endswith(_NOT_WHOLE) and not is_last:
            continue
        others = [value for value in alone[first : number + 1] if value is not None]
        whole = len(others) == len(waiting)
        pieces.append(Piece(text, sum(logps[first : number + 1]), sum(others) if whole else None))
        before, waiting, first = [*before, *waiting][-_CONTEXT:], [], number + 1
    return pieces


def cut_middle(text: str, most: int) -> str:
    """A text with its middle left out where it is longer, and how much of it."""
    if len(text) <= most:
        return text
    head, tail = most // 4, most - most // 4
    return f"{text[:head]} [... {len(text) - most:,} characters ...] {text[len(text) - tail :]}"
