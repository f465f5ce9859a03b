"""Padded rows: each response behind its prompt in a row of its own, all rows of a micro-batch equally long.

They are what a model takes that cannot be handed packed rows. What is scored is a list, as in a packed row: ``source``, the place
whose logits predict, and ``target``, the id they predict.

Shape letters: B rows, S tokens of a row, N scored tokens, R responses, one a row, so that R = B.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from megatron_rmipo.data.batches.packing import PackedRow, responses_of
from megatron_rmipo.data.batches.sizes import Largest
from megatron_rmipo.data.store.pair_store import TokenizedPair
from megatron_rmipo.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class PaddedRows:
    """Rows of one micro-batch and what is scored in them. All tensors are int64 on the CPU.

    A row holds a prompt and a response without its last token, which predicts nothing, and padding behind it. A response that is
    not there (unpaired data) is a row of padding with the length 0.

    Attributes:
        token_ids, position_ids: ``[B, S]``.
        source: ``[N]``, places in ``token_ids.flatten()`` whose logits predict, row by row in ascending order.
        target: ``[N]``, the ids they predict.
        lengths: ``[R]``, scored tokens per response.
        pair_numbers: ``[R]``: which pair of the global batch a response belongs to; -1 marks a filler that must not count.
        branches: ``[R]``: 0 for a chosen response, 1 for a rejected one.
        num_padding: tokens that stand for nothing.
        vocab_size: of the model, without padding for tensor parallelism.
        num_alone: of the responses, the last so many are the first ones again without their prompts, in the same order, to be
            scored without gradient; 0 or R / 2.
    """

    token_ids: Tensor
    position_ids: Tensor
    source: Tensor
    target: Tensor
    lengths: Tensor
    pair_numbers: Tensor
    branches: Tensor
    num_padding: int
    vocab_size: int
    num_alone: int = 0

    @property
    def num_tokens(self) -> int:
        """B x S, padding included."""
        return int(self.token_ids.numel())

    @property
    def num_scored(self) -> int:
        """N."""
        return int(self.source.numel())

    @property
    def num_responses(self) -> int:
        """R."""
        return int(self.lengths.numel())

    @property
    def labels(self) -> Tensor:
        """``[B, S]``, the id that each place predicts; 0 where nothing is scored."""
        return torch.zeros_like(self.token_ids).flatten().index_put((self.source,), self.target).view_as(self.token_ids)

    @property
    def loss_mask(self) -> Tensor:
        """``[B, S]``, 1 where a token is scored."""
        ones = torch.ones_like(self.target)
        return torch.zeros_like(self.token_ids).flatten().index_put((self.source,), ones).view_as(self.token_ids)

    @classmethod
    def of_tensors(
        cls,
        tokens: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        position_ids: Tensor,
        *,
        vocab_size: int,
        with_rejected: bool,
        with_alone: bool,
    ) -> PaddedRows:
        """Rows that somebody else laid out, in the order of :func:`pad_pairs` or :func:`pad_pairs_and_responses`.

        Args:
            tokens, labels, loss_mask, position_ids: ``[B, S]``; the labels stand where the mask is not 0.
            vocab_size: of the model.
            with_rejected: of each pair there are two rows, else the chosen one alone.
            with_alone: the second half of the rows are the responses alone.

        Raises:
            ConfigError: so many rows do not come out even.
        """
        branches, parts = 2 if with_rejected else 1, 2 if with_alone else 1
        num_rows = len(tokens)
        if num_rows % (branches * parts):
            raise ConfigError(f"{num_rows} rows: each pair takes {branches * parts}, and all of them come in one micro-batch.")
        source = loss_mask.flatten().nonzero()[:, 0]
        numbers = torch.arange(num_rows // branches // parts).repeat_interleave(branches).repeat(parts)
        return cls(
            token_ids=tokens,
            position_ids=position_ids,
            source=source,
            target=labels.flatten()[source],
            lengths=(loss_mask != 0).sum(1),
            pair_numbers=numbers,
            branches=torch.arange(num_rows) % branches,
            num_padding=0,
            vocab_size=vocab_size,
            num_alone=num_rows // 2 if with_alone else 0,
        )


Row: TypeAlias = PackedRow | PaddedRows


@dataclasses.dataclass(frozen=True)
class PaddedShape:
    """How pairs are laid out as padded rows.

    Attributes:
        vocab_size: of the model, without padding for tensor parallelism.
        with_rejected: the rejected responses have rows, too.
        multiple_of: S is a multiple of this many tokens.
        pad_to: S; None: as long as the longest row of the micro-batch makes it.
        num_pairs: every micro-batch is filled up to so many pairs; None: as they come.
    """

    vocab_size: int
    with_rejected: bool = True
    multiple_of: int = 1
    pad_to: int | None = None
    num_pairs: int | None = None

    def length_of(self, longest: int) -> int:
        """S of rows of which the longest has so many tokens."""
        return self.pad_to or max(1, -(-longest // self.multiple_of)) * self.multiple_of

    def check(self, lengths: Iterable[tuple[int, np.ndarray]], describe: Callable[[int], str]) -> None:
        """Refuse pairs of which one is too long for ``pad_to``.

        Args:
            lengths: of all pairs, in pieces: (the first pair, int ``[P, 3]``).
            describe: where a pair can be looked up.

        Raises:
            ConfigError: names the longest, and the value that would work.
        """
        if self.pad_to is None:
            return
        check_pad_to(self.pad_to, self.multiple_of)
        pieces = ((first, row_lengths(part, with_rejected=self.with_rejected)) for first, part in lengths)
        longest = Largest.of(pieces, self.pad_to)
        if longest.num_too_large:
            raise ConfigError(
                f"pad_to {self.pad_to}: {describe(longest.which)} needs rows of {longest.size} tokens, and "
                f"{longest.num_too_large} pairs in all do not fit. Use {longest.size} or more, or prepare the data with a "
                "smaller --seq-length."
            )


def check_pad_to(pad_to: int, multiple_of: int) -> None:
    """Refuse rows of a length that is no multiple of what it has to be.

    Raises:
        ConfigError: it is none.
    """
    if pad_to % multiple_of:
        raise ConfigError(f"pad_to {pad_to} is no multiple of multiple_of {multiple_of}; make it one.")


def row_lengths(lengths: np.ndarray, *, with_rejected: bool) -> np.ndarray:
    """Tokens of each pair's longest row, int64 ``[P]``, from int ``[P, 3]`` lengths of prompt, chosen and rejected."""
    prompt, *responses = np.asarray(lengths, dtype=np.int64).T[: 3 if with_rejected else 2]
    longest: np.ndarray = np.maximum(prompt + np.max(responses, axis=0) - 1, 0)
    return longest


def cut_by_length(longest: np.ndarray, num_ranks: int, num_packs: int) -> list[list[list[int]]]:
    """Cut a global batch so that pairs of like length pad each other, longest first.

    Args:
        longest: tokens of each pair's longest row.
        num_ranks: data-parallel ranks.
        num_packs: micro-batches of each.

    Returns:
        For each rank its micro-batches of positions in ``longest``, whose numbers of pairs differ by one at most; the ranks'
        micro-batches of one number are of neighbouring lengths.
    """
    parts = np.array_split(np.argsort(-longest, kind="stable"), num_ranks * num_packs)
    return [[part.tolist() for part in parts[rank::num_ranks]] for rank in range(num_ranks)]


def pad_pairs(pairs: Sequence[TokenizedPair], pair_numbers: Sequence[int], shape: PaddedShape) -> PaddedRows:
    """Lay out each response behind its prompt, every token of it scored; chosen and rejected of a pair come one after the other.

    Args:
        pairs: what to lay out; none longer than ``pad_to`` allows.
        pair_numbers: number of each pair within the global batch, -1 for a filler.
        shape: of the rows.
    """
    return _lay_out([_behind_prompts(pairs, shape)], pair_numbers, shape)


def pad_responses(
    pairs: Sequence[TokenizedPair], pair_numbers: Sequence[int], shape: PaddedShape, *, context_token_id: int | None
) -> PaddedRows:
    """Lay out the responses alone, for log p(y).

    Args:
        pairs, pair_numbers, shape: as of :func:`pad_pairs`.
        context_token_id: as of :func:`megatron_rmipo.data.batches.packing.pack_responses`.
    """
    return _lay_out([_alone(pairs, shape, context_token_id)], pair_numbers, shape)


def pad_pairs_and_responses(
    pairs: Sequence[TokenizedPair], pair_numbers: Sequence[int], shape: PaddedShape, *, context_token_id: int | None
) -> PaddedRows:
    """Lay out pairs as :func:`pad_pairs` does, and their responses alone as further rows behind them."""
    rows = _lay_out([_behind_prompts(pairs, shape), _alone(pairs, shape, context_token_id)], pair_numbers, shape)
    return dataclasses.replace(rows, num_alone=rows.num_responses // 2)


# Of each row its tokens with the last one, the first of them that is scored, and the branch.
_Sequences: TypeAlias = Iterator[tuple[np.ndarray, int, int]]


def _behind_prompts(pairs: Sequence[TokenizedPair], shape: PaddedShape) -> _Sequences:
    for pair in pairs:
        for branch, response in responses_of(pair, shape.with_rejected):
            sequence = np.concatenate([np.asarray(pair.prompt, dtype=np.int64), response])
            yield (sequence if response.size else response), len(pair.prompt), branch


def _alone(pairs: Sequence[TokenizedPair], shape: PaddedShape, context_token_id: int | None) -> _Sequences:
    context = np.array([] if context_token_id is None else [context_token_id], dtype=np.int64)
    for pair in pairs:
        for branch, response in responses_of(pair, shape.with_rejected):
            yield (np.concatenate([context, response]) if response.size else response), 1, branch


def _lay_out(parts: Sequence[_Sequences], pair_numbers: Sequence[int], shape: PaddedShape) -> PaddedRows:
    sequences = [one for part in parts for one in part]
    longest = max(max(sequence.size - 1, 0) for sequence, _, _ in sequences)
    length = shape.length_of(longest)
    assert longest <= length, "checked against the data set before training"
    token_ids = np.zeros((len(sequences), length), dtype=np.int64)
    sources, targets = [], []
    for row, (sequence, first, _) in enumerate(sequences):
        size = max(sequence.size - 1, 0)
        token_ids[row, :size] = sequence[:size]
        sources.append(row * length + np.arange(first - 1, size))
        targets.append(sequence[first:])
    numbers = np.repeat(np.asarray(pair_numbers, dtype=np.int64), 2 if shape.with_rejected else 1)
    return PaddedRows(
        token_ids=torch.from_numpy(token_ids),
        position_ids=torch.arange(length).expand(len(sequences), length).contiguous(),
        source=torch.from_numpy(np.concatenate(sources)),
        target=torch.from_numpy(np.concatenate(targets)),
        lengths=torch.tensor([target.size for target in targets]),
        pair_numbers=torch.from_numpy(np.tile(numbers, len(parts))),
        branches=torch.tensor([branch for _, _, branch in sequences]),
        num_padding=token_ids.size - sum(max(sequence.size - 1, 0) for sequence, _, _ in sequences),
        vocab_size=shape.vocab_size,
    )
