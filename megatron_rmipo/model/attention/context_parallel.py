"""Attention of a row whose tokens lie on several ranks: what the ranks of a context-parallel group send each other for it.

Every function here is collective: the ranks of the group call it together, with the same row.

Shape letters: T tokens of the row, L those of this rank, T / cp, A query heads and G key/value heads of this rank, D head size, E
size of a value, N scored tokens, cp context-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rmipo.model.attention.deal import RowShare

# (queries, keys, values, sinks) -> context
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
# Queries, by their places on this rank, and what computes theirs from the keys and values of the row.
Part = tuple[slice, Attend]


def attend_gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    parts: Sequence[Part],
    share: RowShare,
    group: ProcessGroup,
) -> Tensor:
    """Attention of this rank's queries to the keys and values of all ranks.

    What it takes is all that it keeps for the backward pass, which gathers again and computes one part after the other anew: no
    rank holds the keys of the row, or masks of its queries against them, for more than one layer at a time.

    Args:
        query: ``[L, A, D]``.
        key: ``[L, G, D]``.
        value: ``[L, G, E]``.
        sinks: ``[A]``, where the rules have sinks.
        parts: of the queries, in their order.
        share: how the row is shared out.
        group: the context-parallel group.

    Returns:
        ``[L, A, E]``.
    """
    function: Any = _AttendGathered
    context: Tensor = function.apply(query, key, value, sinks, parts, share, group)
    return context


class _AttendGathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        parts: Sequence[Part],
        share: RowShare,
        group: ProcessGroup,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, sinks)
        ctx.parts, ctx.share, ctx.group = parts, share, group
        keys, values = (_gather(tensor, share, group) for tensor in (key, value))
        return torch.cat([attend(query[queries], keys, values, sinks) for queries, attend in parts])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks = ctx.saved_tensors
        share, group = ctx.share, ctx.group
        shared = [_gather(tensor, share, group).requires_grad_() for tensor in (key, value)]
        if sinks is not None:
            shared.append(sinks.detach().requires_grad_())
        grad_query = torch.empty_like(query)
        for queries, attend in ctx.parts:
            part = query[queries].detach().requires_grad_()
            with torch.enable_grad():
                context = attend(part, shared[0], shared[1], shared[2] if sinks is not None else None)
            torch.autograd.backward(context, grad_outputs[0][queries], inputs=[part, *shared])
            grad_query[queries] = part.grad
        grad_key, grad_value = (_reduce_scatter(tensor.grad, share, group) for tensor in shared[:2])
        return grad_query, grad_key, grad_value, shared[2].grad if sinks is not None else None, None, None, None


def _gather(tensor: Tensor, share: RowShare, group: ProcessGroup) -> Tensor:
    """``[T, ...]`` in the order of the row from each rank's ``[L, ...]``."""
    found = tensor.new_empty((tensor.shape[0] * group.size(), *tensor.shape[1:]))
    dist.all_gather_into_tensor(found, tensor.contiguous(), group=group)
    return found.index_select(0, share.order)


def _reduce_scatter(tensor: Tensor | None, share: RowShare, group: ProcessGroup) -> Tensor:
    """``[L, ...]``: this rank's tokens of the sum over ranks of ``[T, ...]``."""
    assert tensor is not None
    own = tensor.new_empty((tensor.shape[0] // group.size(), *tensor.shape[1:]))
    dist.reduce_scatter_tensor(own, tensor.index_select(0, share.dealt), group=group)
    return own


def heads_of_row(tensor: Tensor, share: RowShare, group: ProcessGroup) -> Tensor:
    """Some heads for all tokens, ``[T, heads / cp, D]`` in the row's order, for all heads of some tokens, ``[L, heads, D]``."""
    function: Any = _HeadsOfRow
    exchanged: Tensor = function.apply(tensor, share, group)
    return exchanged


def tokens_of_rank(tensor: Tensor, share: RowShare, group: ProcessGroup) -> Tensor:
    """The other way around: ``[L, heads, E]`` for ``[T, heads / cp, E]``."""
    function: Any = _TokensOfRank
    exchanged: Tensor = function.apply(tensor, share, group)
    return exchanged


class _HeadsOfRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, share: RowShare, group: ProcessGroup) -> Tensor:
        ctx.share, ctx.group = share, group
        return _to_heads(tensor, share, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return _to_tokens(grad_outputs[0], ctx.share, ctx.group), None, None


class _TokensOfRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, share: RowShare, group: ProcessGroup) -> Tensor:
        ctx.share, ctx.group = share, group
        return _to_tokens(tensor, share, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return _to_heads(grad_outputs[0], ctx.share, ctx.group), None, None


def _to_heads(tensor: Tensor, share: RowShare, group: ProcessGroup) -> Tensor:
    # [L, heads, D] -> for each rank its heads of them, [cp, L, heads / cp, D]
    by_rank = tensor.reshape(tensor.shape[0], group.size(), -1, tensor.shape[2]).transpose(0, 1).contiguous()
    received = torch.empty_like(by_rank)
    dist.all_to_all_single(received, by_rank, group=group)
    return received.flatten(0, 1).index_select(0, share.order)


def _to_tokens(tensor: Tensor, share: RowShare, group: ProcessGroup) -> Tensor:
    by_rank = tensor.index_select(0, share.dealt).view(group.size(), -1, *tensor.shape[1:])
    received = torch.empty_like(by_rank)
    dist.all_to_all_single(received, by_rank, group=group)
    return received.transpose(0, 1).flatten(1, 2)


def join_scores(own: Tensor, held: Tensor, num_scored: int, group: ProcessGroup) -> Tensor:
    """The scores of all N tokens, on every rank.

    Every rank then computes the same loss of them. Backward, gradients are summed over the ranks: that of the sum of their
    losses, cp times the gradient of one. It goes with counting each pair cp times, once on each rank.

    Args:
        own: ``[..., n]``, of the tokens that this rank has scored.
        held: int64 ``[n]``, which of the N they are.
        num_scored: N.
        group: the context-parallel group.

    Returns:
        ``[..., N]``.
    """
    function: Any = _JoinScores
    joined: Tensor = function.apply(own, held, num_scored, group)
    return joined


class _JoinScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, held: Tensor, num_scored: int, group: ProcessGroup) -> Tensor:
        ctx.save_for_backward(held)
        ctx.group = group
        joined = own.new_zeros((*own.shape[:-1], num_scored))
        joined[..., held] = own
        dist.all_reduce(joined, group=group)
        return joined

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (held,) = ctx.saved_tensors
        grad = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad[..., held], None, None, None
