"""Rows of other programs that each hold a prompt and one response: their sums by pair, their responses alone, losses of them.

Rows come in either of two orders: pair by pair, the chosen response first, or all chosen responses before all rejected ones.

Shape letters: B rows, S tokens of a row, P pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.objectives.base import LogpNeeds, LossOutput, Objective, PairLogps
from megatron_rmipo.objectives.metrics import output_of
from megatron_rmipo.objectives.pair_sums import PairSums

RowOrder: TypeAlias = Literal["interleaved", "chosen_first"]


def sums_of_rows(logprobs: Tensor, scored: Tensor, order: RowOrder) -> PairSums:
    """Sum each row's scored tokens, in float64 as the packed rows' are, and put rows together to pairs.

    Args:
        logprobs: ``[B, S]``, of each token, or of the one after it: whatever ``scored`` is aligned with.
        scored: ``[B, S]``, non-zero where a token belongs to the response. What ``logprobs`` holds elsewhere is not read.
        order: of the rows.

    Raises:
        ConfigError: the number of rows is odd, so that a response is without its pair.
    """
    counts = scored.to(torch.bool)
    sums = torch.where(counts, logprobs, 0.0).sum(dim=1, dtype=torch.float64).to(torch.float32)
    return PairSums(pairs_of_rows(sums, order), pairs_of_rows(counts.sum(dim=1).to(torch.float32), order))


def pairs_of_rows(values: Tensor, order: RowOrder) -> Tensor:
    """One value a row, ``[B]``, as ``[P, 2]`` of (chosen, rejected).

    Raises:
        ConfigError: the number of rows is odd.
    """
    if values.shape[0] % 2:
        raise ConfigError(
            f"a batch of {values.shape[0]} rows: each pair is two, its chosen and its rejected response, and both must come in "
            "one micro-batch; switch off what cuts or packs batches row by row"
        )
    return values.view(-1, 2) if order == "interleaved" else values.view(2, -1).t()


def rows_of_pairs(values: Tensor, order: RowOrder) -> Tensor:
    """``[P, 2]`` of (chosen, rejected), or one value a pair ``[P]``, as one value a row ``[B]``."""
    both = values[:, None].expand(-1, 2) if values.dim() == 1 else values
    return (both if order == "interleaved" else both.t()).reshape(-1)


def pair_losses(objective: Objective, logps: PairLogps) -> LossOutput:
    """The objective's losses and metrics, checked.

    Raises:
        DataError: a pair lacks a token of a response that the objective reads.
        ConfigError: the objective gave something else than one value a pair.
    """
    if not objective.needs.unpaired:
        lengths = [logps.chosen_lengths, logps.rejected_lengths] if objective.needs.rejected else [logps.chosen_lengths]
        for side, number in zip(("chosen", "rejected"), lengths, strict=False):
            empty = torch.nonzero(number == 0).flatten().tolist()
            if empty:
                raise DataError(
                    f"no token of the {side} response of pair {empty[0]} of a batch is scored ({len(empty)} such pairs); "
                    f"objective {objective.name} needs one: leave such pairs out, or let prompts leave room for the responses"
                )
    return output_of(objective, logps)


@dataclasses.dataclass(frozen=True)
class ResponseRows:
    """Responses alone, a row each, padded at the end.

    Attributes:
        token_ids: int64 ``[B, S']``.
        attended: bool ``[B, S']``: which are tokens, and not padding.
        scored: bool ``[B, S']``: which tokens log p(y) counts.
    """

    token_ids: Tensor
    attended: Tensor
    scored: Tensor


def rows_of_responses(
    token_ids: Tensor, response: Tensor, *, context_token_id: int | None, pad_token_id: int = 0
) -> ResponseRows:
    """Rows for log p(y): each response after the context token, or where there is none alone, its first token not scored.

    A response reaches from the first token that is marked to the last; unmarked ones in between are read and not scored.

    Args:
        token_ids: int64 ``[B, S]``, prompts with responses.
        response: ``[B, S]``, non-zero at the tokens of the response.
        context_token_id: BOS, or what stands in for it (:mod:`megatron_rmipo.data.encoding.context_token`).
        pad_token_id: any id of the vocabulary; no token that counts sees it.
    """
    marked = response.to(torch.bool)
    size = marked.shape[1]
    places = torch.arange(size, device=marked.device)
    first = torch.where(marked, places, size).amin(dim=1)
    lengths = torch.where(marked, places + 1, 0).amax(dim=1).sub(first).clamp(min=0)
    width = max(int(lengths.max()), 1)
    places = places[:width]
    # No row is without a token to attend to, be it one of padding.
    attended = places < lengths.clamp(min=1)[:, None]
    from_places = (first[:, None] + places).clamp(max=size - 1)
    is_token = places < lengths[:, None]
    alone = torch.where(is_token, token_ids.gather(1, from_places), pad_token_id)
    scored = is_token & marked.gather(1, from_places)
    if context_token_id is None:
        return ResponseRows(alone, attended, scored & (places > 0))
    context = torch.ones_like(attended[:, :1])
    return ResponseRows(
        torch.cat([torch.full_like(alone[:, :1], context_token_id), alone], dim=1),
        torch.cat([context, is_token], dim=1),
        torch.cat([~context, scored], dim=1),
    )


def refuse_needs(objective: Objective, program: str, reasons: Mapping[str, str]) -> None:
    """Refuse an objective that needs what a program cannot give.

    Args:
        objective: what is to be trained.
        program: its name, for the message.
        reasons: field of :class:`LogpNeeds` -> why there is none of it there, and what to do.

    Raises:
        ConfigError: naming the objective, what it needs and why there is none.
    """
    needs = objective.needs
    for name, reason in reasons.items():
        if getattr(needs, name) != getattr(LogpNeeds(), name):
            raise ConfigError(f"objective {objective.name} in {program}: it needs {_NEEDS_IN_WORDS[name]}; {reason}")


_NEEDS_IN_WORDS = {
    "unconditional": "log p(y) of the responses alone",
    "reference": "log-probs under a reference",
    "mismatched": "log-probs of responses to other prompts",
    "batch": "log-probs of the whole global batch before its losses",
    "perturbation": "a reference whose logits are mixed with the policy's",
    "columns": "numbers beside each pair in the data",
}
