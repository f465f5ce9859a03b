"""Packed rows: several pairs in one row of tokens, no padding, each prompt once.

Shape letters: T packed tokens, S segments, N scored tokens, R responses.

For a pair with prompt x and responses y_w, y_l the row holds ``x y_w y_l``, each response without its last token, which
predicts nothing. A token attends to earlier tokens of its own response and to the prompt. What is scored is a list of triples:
``source`` (the token whose hidden state predicts), ``target`` (the id it predicts), ``response`` (whose sum it joins). The last
prompt token is the source of two triples, one per response: that is all it takes to share a prompt.

A response that a row does not have (unpaired data) takes no tokens and no triples, nor does its prompt for it; it keeps its place
among the responses, with the length 0.

The same responses without their prompts, for log p(y), are rows of their own, or further segments of the row of their pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_rmipo.data.store.pair_store import TokenizedPair


@dataclasses.dataclass(frozen=True)
class PackedRow:
    """One row of tokens and what is scored in it. All tensors are int64 on the CPU.

    Attributes:
        token_ids, position_ids: ``[T]``.
        segments: ``[S, 4]``: start, length, prefix start, prefix length; see :mod:`megatron_rmipo.model.attention.packed`.
        source, target, response: ``[N]``, the scored triples.
        lengths: ``[R]``, scored tokens per response, 0 for one that the row does not have.
        pair_numbers: ``[R]``: which pair of the global batch a response belongs to; -1 marks a filler that must not count.
        branches: ``[R]``: 0 for a chosen response, 1 for a rejected one.
        num_padding: tokens at the end that stand for nothing (to make T a multiple).
        num_alone: of the responses, the last so many are the first ones again without their prompts, in the same order, to be
            scored without gradient; 0 or R / 2.
        num_alone_tokens, num_alone_scored: tokens before the padding that these take, and of the triples the last ones.
    """

    token_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    source: Tensor
    target: Tensor
    response: Tensor
    lengths: Tensor
    pair_numbers: Tensor
    branches: Tensor
    num_padding: int
    num_alone: int = 0
    num_alone_tokens: int = 0
    num_alone_scored: int = 0

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return int(self.token_ids.numel())

    @property
    def num_scored(self) -> int:
        """N."""
        return int(self.source.numel())

    @property
    def num_responses(self) -> int:
        """R."""
        return int(self.lengths.numel())


class _RowBuilder:
    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.segments: list[tuple[int, int, int, int]] = []
        self.sources: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.pair_numbers: list[int] = []
        self.branches: list[int] = []
        self.cursor = 0

    def add_segment(self, tokens: np.ndarray, first_position: int, prefix: tuple[int, int] = (0, 0)) -> int:
        """Append tokens as a segment; returns where they start."""
        start = self.cursor
        if tokens.size:
            self.tokens.append(tokens)
            self.positions.append(np.arange(first_position, first_position + tokens.size))
            self.segments.append((start, tokens.size, *prefix))
            self.cursor += tokens.size
        return start

    def add_response(self, sources: np.ndarray, targets: np.ndarray, pair_number: int, branch: int) -> None:
        self.sources.append(sources)
        self.targets.append(targets)
        self.lengths.append(targets.size)
        self.pair_numbers.append(pair_number)
        self.branches.append(branch)

    def add_pair(self, pair: TokenizedPair, number: int, *, share_prompts: bool, with_rejected: bool) -> None:
        """Append a prompt with its responses."""
        prompt = np.asarray(pair.prompt, dtype=np.int64)
        prompt_start: int | None = None
        for branch, targets in responses_of(pair, with_rejected):
            if not targets.size:
                self.add_response(targets, targets, number, branch)
                continue
            if prompt_start is None or not share_prompts:
                prompt_start = self.add_segment(np.concatenate([prompt, targets[:-1]]), 0)
                first = prompt_start + prompt.size
            else:
                first = self.add_segment(targets[:-1], prompt.size, prefix=(prompt_start, prompt.size))
            # The first token of a response is predicted by the last one of the prompt, wherever that stands.
            sources = np.concatenate([[prompt_start + prompt.size - 1], np.arange(first, first + targets.size - 1)])
            self.add_response(sources, targets, number, branch)

    def add_alone(self, pair: TokenizedPair, number: int, *, context_token_id: int | None, with_rejected: bool) -> None:
        """Append responses without their prompt."""
        context = np.array([] if context_token_id is None else [context_token_id], dtype=np.int64)
        for branch, tokens in responses_of(pair, with_rejected):
            sequence = np.concatenate([context, tokens])
            start = self.add_segment(sequence[:-1], 0)
            targets = sequence[1:]
            self.add_response(np.arange(start, start + targets.size), targets, number, branch)

    def build(self, multiple_of: int, *, num_alone: int = 0, num_alone_tokens: int = 0) -> PackedRow:
        # An empty row (every response one token, nothing scored) still needs a token for the model to run on.
        num_padding = max(-self.cursor % multiple_of, 0 if self.cursor else multiple_of)
        self.add_segment(np.zeros(num_padding, dtype=np.int64), 0)
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        return PackedRow(
            token_ids=_concatenate(self.tokens),
            position_ids=_concatenate(self.positions),
            segments=torch.tensor(self.segments, dtype=torch.int64).view(-1, 4),
            source=_concatenate(self.sources),
            target=_concatenate(self.targets),
            response=torch.repeat_interleave(torch.arange(lengths.numel()), lengths),
            lengths=lengths,
            pair_numbers=torch.tensor(self.pair_numbers, dtype=torch.int64),
            branches=torch.tensor(self.branches, dtype=torch.int64),
            num_padding=num_padding,
            num_alone=num_alone,
            num_alone_tokens=num_alone_tokens,
            num_alone_scored=sum(self.lengths[len(self.lengths) - num_alone :]),
        )


def responses_of(pair: TokenizedPair, with_rejected: bool) -> Iterator[tuple[int, np.ndarray]]:
    """(branch, token ids) of the responses that a layout has, int64 ``[tokens]``; one that is not there is empty."""
    for branch, response in enumerate((pair.chosen, pair.rejected) if with_rejected else (pair.chosen,)):
        yield branch, np.asarray(response, dtype=np.int64)


def _concatenate(parts: list[np.ndarray]) -> Tensor:
    if not parts:
        return torch.zeros(0, dtype=torch.int64)
    return torch.from_numpy(np.concatenate(parts).astype(np.int64, copy=False))


def pack_pairs(
    pairs: Sequence[TokenizedPair],
    pair_numbers: Sequence[int],
    *,
    share_prompts: bool = True,
    with_rejected: bool = True,
    multiple_of: int = 1,
) -> PackedRow:
    """Lay out pairs as one row, every token of every response scored.

    Args:
        pairs: what to pack; prompts hold at least one token each, and so do responses but for those that a row does not have.
        pair_numbers: number of each pair within the global batch, -1 for a filler.
        share_prompts: whether a prompt stands once for both responses, or once for each.
        with_rejected: False packs prompts and chosen responses alone.
        multiple_of: T is padded to a multiple of this (as sequence parallelism, FlexAttention's blocks and fp8 want).

    Returns:
        The row; responses come in the order chosen, rejected of the first pair, then of the next.
    """
    builder = _RowBuilder()
    for pair, number in zip(pairs, pair_numbers, strict=True):
        builder.add_pair(pair, number, share_prompts=share_prompts, with_rejected=with_rejected)
    return builder.build(multiple_of)


def pack_responses(
    pairs: Sequence[TokenizedPair],
    pair_numbers: Sequence[int],
    *,
    context_token_id: int | None,
    with_rejected: bool = True,
    multiple_of: int = 1,
) -> PackedRow:
    """Lay out the responses alone, each its own sequence, for log p(y).

    Args:
        pairs: what to pack.
        pair_numbers: number of each pair within the global batch, -1 for a filler.
        context_token_id: a token (BOS) that stands before each response, so that all its tokens are scored; None for no
            context, where the first token is not scored and a one-token response scores nothing.
        with_rejected: False packs the chosen responses alone.
        multiple_of: T is padded to a multiple of this.
    """
    builder = _RowBuilder()
    for pair, number in zip(pairs, pair_numbers, strict=True):
        builder.add_alone(pair, number, context_token_id=context_token_id, with_rejected=with_rejected)
    return builder.build(multiple_of)


def pack_sequences(sequences: Sequence[Sequence[int]], numbers: Sequence[int], *, multiple_of: int = 1) -> PackedRow:
    """Lay out sequences whose next tokens are wanted: the last token of each is the source of one triple.

    Args:
        sequences: token ids, at least one each.
        numbers: number of each sequence, -1 for a filler.
        multiple_of: T is padded to a multiple of this.

    Returns:
        The row; its targets are not known, and 0.
    """
    builder = _RowBuilder()
    for sequence, number in zip(sequences, numbers, strict=True):
        start = builder.add_segment(np.asarray(sequence, dtype=np.int64), 0)
        builder.add_response(np.array([start + len(sequence) - 1]), np.zeros(1, dtype=np.int64), number, 0)
    return builder.build(multiple_of)


def pack_pairs_and_responses(
    pairs: Sequence[TokenizedPair],
    pair_numbers: Sequence[int],
    *,
    context_token_id: int | None,
    share_prompts: bool = True,
    with_rejected: bool = True,
    multiple_of: int = 1,
) -> PackedRow:
    """Lay out pairs as :func:`pack_pairs` does, and their responses alone behind them, in the same row.

    It is for loops that have no place for a pass over the responses before the one with gradient.

    Args:
        pairs, pair_numbers, share_prompts, with_rejected, multiple_of: as there.
        context_token_id: as of :func:`pack_responses`.
    """
    builder = _RowBuilder()
    for pair, number in zip(pairs, pair_numbers, strict=True):
        builder.add_pair(pair, number, share_prompts=share_prompts, with_rejected=with_rejected)
    num_conditional, conditional_tokens = len(builder.lengths), builder.cursor
    for pair, number in zip(pairs, pair_numbers, strict=True):
        builder.add_alone(pair, number, context_token_id=context_token_id, with_rejected=with_rejected)
    return builder.build(multiple_of, num_alone=num_conditional, num_alone_tokens=builder.cursor - conditional_tokens)
