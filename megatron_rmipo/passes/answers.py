"""Answers of a model to prompts, at any layout, a token at a time: no keys are kept, and each token runs all sequences again.

Every function here is collective: all ranks of the run call it together, with the same prompts.

Shape letter: P sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence

import torch

from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.packing import PackedRow, pack_sequences
from megatron_rmipo.model.packed_model import Chunks
from megatron_rmipo.model.vocabulary_shard import TokenChoice
from megatron_rmipo.passes.rows import from_last_stage, gather_pairs, run_rows
from megatron_rmipo.runtime.groups import ProcessGroups, current_device


@dataclasses.dataclass
class Answer:
    """What a model says to a prompt.

    Attributes:
        token_ids: of the answer, without what ended it.
        ended: whether a token that ends an answer came, and not the limit.
    """

    token_ids: list[int] = dataclasses.field(default_factory=list)
    ended: bool = False


@torch.no_grad()
def answer_prompts(
    model: Chunks,
    prompts: Sequence[Sequence[int]],
    *,
    most_tokens: int,
    ends: Collection[int],
    choice: TokenChoice,
    layout: BatchLayout,
    groups: ProcessGroups,
    goes_on: Callable[[], bool] = lambda: True,
) -> list[Answer] | None:
    """Answer prompts.

    Args:
        model: the policy, or its chunks, in evaluation mode.
        prompts: token ids; each with its answer fits a row of the layout.
        most_tokens: of an answer.
        ends: ids that end an answer.
        choice: how tokens are chosen.
        layout: how rows are laid out.
        groups: the process groups of this rank.
        goes_on: asked before each token, on all ranks together.

    Returns:
        The answers, the same on every rank; None where it went on no more.
    """
    answers = [Answer() for _ in prompts]
    for _ in range(most_tokens):
        open_ones = [number for number, answer in enumerate(answers) if not answer.ended]
        if not open_ones:
            break
        if not goes_on():
            return None
        sequences = [[*prompts[number], *answers[number].token_ids] for number in open_ones]
        for number, token in zip(open_ones, next_tokens(model, sequences, open_ones, choice, layout, groups), strict=True):
            if token in ends:
                answers[number].ended = True
            else:
                answers[number].token_ids.append(token)
    return answers


def next_tokens(
    model: Chunks,
    sequences: Sequence[Sequence[int]],
    numbers: Sequence[int],
    choice: TokenChoice,
    layout: BatchLayout,
    groups: ProcessGroups,
) -> list[int]:
    """The token that is chosen to follow each sequence, the same on every rank.

    Args:
        model: the policy, or its chunks, in evaluation mode.
        sequences: token ids.
        numbers: of the sequences, by which tokens are drawn.
        choice, layout, groups: as of :func:`answer_prompts`.
    """
    shares = [_packs(sequences, range(rank, len(sequences), layout.dp_size), layout) for rank in range(layout.dp_size)]
    own = shares[layout.dp_rank]
    # Replicas may meet in layers of experts, so that all run as many rows.
    own += [[] for _ in range(max(map(len, shares)) - len(own))]
    places = {number: place for place, number in enumerate(numbers)}
    table = torch.zeros(len(sequences) + 1, dtype=torch.int64, device=current_device())
    keep = lambda row, tokens: (row, tokens)  # noqa: E731
    rows = [_row(pack, sequences, numbers, layout) for pack in own]
    for row, chosen in run_rows(model, rows, keep, name="answering pass", backward=False, choice=choice):
        # One place more at the end, where a filler writes.
        table[torch.tensor([places.get(number, -1) for number in row.pair_numbers.tolist()], device=table.device)] = chosen
    found = gather_pairs(table[: len(sequences)], groups) if groups.is_last_stage else None
    everywhere: torch.Tensor = from_last_stage(found, groups)
    tokens: list[int] = everywhere.tolist()
    return tokens


def _packs(sequences: Sequence[Sequence[int]], own: Sequence[int], layout: BatchLayout) -> list[list[int]]:
    """Which sequences stand in a row together, as many as fit; at least one row."""
    packs: list[list[int]] = [[]]
    room = layout.capacity
    for place in own:
        if packs[-1] and len(sequences[place]) > room:
            packs.append([])
            room = layout.capacity
        packs[-1].append(place)
        room -= len(sequences[place])
    return packs


def _row(pack: Sequence[int], sequences: Sequence[Sequence[int]], numbers: Sequence[int], layout: BatchLayout) -> PackedRow:
    if not pack:
        return pack_sequences([[0]], [-1], multiple_of=layout.multiple_of)
    return pack_sequences(
        [sequences[place] for place in pack], [numbers[place] for place in pack], multiple_of=layout.multiple_of
    )
