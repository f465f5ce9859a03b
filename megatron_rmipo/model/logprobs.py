"""Log-probabilities over a vocabulary sharded by tensor parallelism, without ever holding ``[tokens, vocab/tp]`` logits at once.

Shape letters: N scored tokens, H hidden, V full vocabulary, tp tensor-parallel size, C vocabulary entries of one chunk.

Three forms:

* :func:`linear_logprobs` fuses the output layer with the log-prob: hidden states and the weight shard in, ``[N]`` log-probs out.
* :func:`perturbed_linear_logprobs` also scores the targets under a reference model's logits and mixtures with them.
* :func:`vocab_parallel_logprobs` takes ready-made logits, for models whose head is not ours.

All use two collectives a call, whatever the chunk count: one max and one sum over the tensor-parallel group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rmipo.model.products import accumulation_dtype, add_product, product
from megatron_rmipo.model.vocabulary_shard import (
    PLAIN_LOGITS,
    LogitRules,
    LogitStatistics,
    TokenChoice,
    VocabularyShard,
    logits_grad,
)
from megatron_rmipo.model.weight_gradient import WeightGrad, call_for_weight, refuse_weight_in_buffer


@dataclasses.dataclass(frozen=True)
class ReferenceHead:
    """What of a frozen reference model is needed to mix its logits with the policy's.

    Attributes:
        hidden: ``[N, H']``, its hidden states of the same scored tokens, without gradient; replicated over the group.
        weight: ``[V_padded / tp, H']``, this rank's rows of its output layer, sharded like the policy's.
        epsilon: share of the reference in a mixture.
        rules: what makes its logits of the products of these two.
    """

    hidden: Tensor
    weight: Tensor
    epsilon: float
    rules: LogitRules = PLAIN_LOGITS


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor | torch.nn.Module,
    target: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    vocab_size: int | None = None,
    chunk_size: int = 4096,
    reduce_hidden_grad: bool = True,
    rules: LogitRules = PLAIN_LOGITS,
) -> Tensor:
    """Log-probability of each target under ``softmax(hidden @ weight.T)``, the vocabulary sharded over ``group``.

    Equivalent, on one rank, to
    ``torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, target[:, None])[:, 0]``.

    Every rank of ``group`` must call it together, with the same hidden states and targets.

    A weight that Megatron's DDP has wrapped gets its gradient added to ``weight.main_grad`` chunk by chunk, and autograd an empty
    one: other uses of the weight in the same step, fused or not, keep theirs. ``torch.autograd.grad`` gets it as a tensor.

    Args:
        hidden: ``[N, H]``, any floating dtype; replicated over the group.
        weight: ``[V_padded / tp, H]``, this rank's rows of the output layer, in rank order; or the module that holds them as its
            ``weight``, whose hooks then run as in a call of it. It takes the module where Megatron's distributed optimizer
            updates the weight.
        target: int64 ``[N]``, ids in ``[0, vocab_size)``.
        group: the tensor-parallel group; None for an unsharded vocabulary.
        vocab_size: real vocabulary size; rows of the weight from there on are padding and count as probability zero.
        chunk_size: logits of all N tokens are made for this many vocabulary entries at a time, forward and backward.
        reduce_hidden_grad: whether the gradient of ``hidden`` is summed over the group here. Pass False where the caller's
            own backward does that, such as a gather from a sequence-parallel region.
        rules: what makes logits of ``hidden @ weight.T``.

    Returns:
        fp32 ``[N]``, replicated over the group.

    Raises:
        ConfigError: a bare weight of which the distributed optimizer may have other ranks' parts still to gather.
    """
    options: dict[str, Any] = {"chunk_size": chunk_size, "reduce_hidden_grad": reduce_hidden_grad, "rules": rules}
    return _from_weight(hidden, weight, target, group, vocab_size, **options)[0]


def perturbed_linear_logprobs(
    hidden: Tensor,
    weight: Tensor | torch.nn.Module,
    target: Tensor,
    reference: ReferenceHead,
    group: dist.ProcessGroup | None = None,
    *,
    vocab_size: int | None = None,
    chunk_size: int = 4096,
    reduce_hidden_grad: bool = True,
    rules: LogitRules = PLAIN_LOGITS,
) -> Tensor:
    """:func:`linear_logprobs`, and the same targets under a frozen reference and under two mixtures of both models' logits.

    Every rank of ``group`` must call it together. All four share the chunks and the two collectives.

    Args:
        hidden, weight, target, group, vocab_size, chunk_size, reduce_hidden_grad, rules: as there.
        reference: hidden states of the same tokens, output layer and share of the other model.

    Returns:
        fp32 ``[4, N]``, replicated over the group: the log-probability under the policy's logits f, the reference's r,
        ``(1 + epsilon) f - epsilon r`` and ``(1 - epsilon) f + epsilon r``. Only the first row carries gradient.

    Raises:
        ConfigError: as there.
    """
    options: dict[str, Any] = {"chunk_size": chunk_size, "reduce_hidden_grad": reduce_hidden_grad, "rules": rules}
    return _from_weight(hidden, weight, target, group, vocab_size, reference=reference, **options)


def _from_weight(
    hidden: Tensor,
    weight: Tensor | torch.nn.Module,
    target: Tensor,
    group: dist.ProcessGroup | None,
    vocab_size: int | None,
    **options: Any,
) -> Tensor:
    """:func:`head_logprobs` of a bare weight, or in a call of the module that holds it."""

    def score(hidden: Tensor, weight: Tensor) -> Tensor:
        return head_logprobs(hidden, weight, target, VocabularyShard(weight.shape[0], vocab_size, group), **options)

    if isinstance(weight, torch.nn.Module):
        return call_for_weight(weight, score, hidden)
    refuse_weight_in_buffer(weight)
    return score(hidden, weight)


def head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    shard: VocabularyShard,
    *,
    chunk_size: int,
    reduce_hidden_grad: bool,
    rules: LogitRules = PLAIN_LOGITS,
    reference: ReferenceHead | None = None,
    num_ungraded: int = 0,
) -> Tensor:
    """:func:`linear_logprobs` within a call of the module that holds the weight; with a reference the perturbed form.

    With a reference all four normalizers come from the same chunks of logits and share the two collectives; neither model's
    ``[N, V]`` logits are ever whole or gathered.

    Args:
        hidden, weight, target, chunk_size, reduce_hidden_grad, rules: as there.
        shard: of the weight's rows; its group calls this together.
        reference: scores the targets under its logits r, and under two mixtures of them with the policy's f.
        num_ungraded: the last so many of the N carry no gradient, and the backward pass computes nothing for them.

    Returns:
        fp32 ``[1, N]``, replicated over the group; with a reference ``[4, N]``: the log-probability under ``f``, ``r``,
        ``(1 + epsilon) f - epsilon r`` and ``(1 - epsilon) f + epsilon r``. Only the first row carries gradient.
    """
    assert hidden.dim() == 2, hidden.shape
    assert target.shape == hidden.shape[:1], (hidden.shape, target.shape)
    if reference is not None:
        assert hidden.shape[0] == reference.hidden.shape[0], (hidden.shape, reference.hidden.shape)
        assert weight.shape[0] == reference.weight.shape[0], (weight.shape, reference.weight.shape)
    function: Any = _LinearLogprobs
    logprobs: Tensor = function.apply(
        hidden, weight, target, shard, chunk_size, reduce_hidden_grad, rules, reference, target.numel() - num_ungraded
    )
    return logprobs


@torch.no_grad()
def head_tokens(
    hidden: Tensor,
    weight: Tensor,
    shard: VocabularyShard,
    choice: TokenChoice,
    *,
    chunk_size: int,
    rules: LogitRules = PLAIN_LOGITS,
) -> Tensor:
    """The tokens that are chosen to follow hidden states, int64 ``[N]``, replicated over the group, which calls it together.

    Args:
        hidden: ``[N, H]``, replicated over the group.
        weight: ``[V_padded / tp, H]``, this rank's rows of the output layer.
        shard: of these rows.
        choice: how, and of which sequences they are.
        chunk_size: logits are made for this many vocabulary entries at a time.
        rules: what makes logits of the products.
    """
    noise = choice.noise(shard, hidden)
    dtype = accumulation_dtype(hidden.dtype)
    most = torch.full((hidden.shape[0],), float("-inf"), dtype=dtype, device=hidden.device)
    ids = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    for chunk in _chunks(shard.valid_rows, chunk_size):
        logits = _chunk_logits(hidden, weight, rules, chunk)
        if noise is not None:
            logits = logits.div_(choice.temperature).add_(noise[:, chunk])
        values, columns = logits.max(dim=1)
        ids = torch.where(values > most, columns + chunk.start + shard.vocab_start_index, ids)
        most = torch.maximum(values, most)
    return shard.largest(most, ids)


def vocab_parallel_logprobs(
    logits: Tensor, target: Tensor, group: dist.ProcessGroup | None = None, *, vocab_size: int | None = None
) -> Tensor:
    """Log-probability of each target from vocabulary-sharded logits. The logits are left as they are.

    Every rank of ``group`` must call it together.

    Args:
        logits: ``[..., V_padded / tp]``, any floating dtype; this rank's columns.
        target: int64 ``[...]``, ids in ``[0, vocab_size)``.
        group: the tensor-parallel group; None for an unsharded vocabulary.
        vocab_size: real vocabulary size; columns from there on are padding and count as probability zero.

    Returns:
        fp32 ``[...]``, replicated over the group. The gradient of the logits is this rank's columns of the dense gradient.
    """
    shard = VocabularyShard(logits.shape[-1], vocab_size, group)
    function: Any = _LogitsLogprobs
    flat: Tensor = function.apply(logits.flatten(0, -2), target.flatten(), shard)
    return flat.view(target.shape)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        shard: VocabularyShard,
        chunk_size: int,
        reduce_hidden_grad: bool,
        rules: LogitRules,
        reference: ReferenceHead | None,
        num_graded: int,
    ) -> Tensor:
        local = shard.local_target(target)
        statistics = LogitStatistics.empty(hidden, 1 if reference is None else 4, hidden.shape[0])
        scratch = _scratch(hidden, shard.valid_rows, chunk_size)
        for chunk in _chunks(shard.valid_rows, chunk_size):
            for row, logits in _logits_to_score(hidden, weight, rules, reference, chunk, scratch):
                statistics[row].add(logits, local - chunk.start)
                # Gone before the next are made.
                del logits
        logprobs, log_sum_exp = shard.combine(statistics)
        ctx.save_for_backward(hidden, weight, local[:num_graded], log_sum_exp[0, :num_graded])
        # The parameter itself: its main_grad is not on the tensor that autograd saves.
        ctx.weight = weight
        ctx.shard, ctx.chunk_size, ctx.reduce_hidden_grad, ctx.rules = shard, chunk_size, reduce_hidden_grad, rules
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        whole, weight, local, log_sum_exp = ctx.saved_tensors
        num_graded = local.numel()
        grad, hidden = grad_outputs[0][0, :num_graded], whole[:num_graded]
        shard: VocabularyShard = ctx.shard
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        # Summed over chunks in fp32: in bf16 each chunk would round away part of the ones before it.
        grad_hidden = torch.zeros_like(whole, dtype=accumulation_dtype(hidden.dtype)) if needs_hidden else None
        grad_weight = WeightGrad(ctx.weight, ctx.next_functions[1][0], shard.valid_rows) if needs_weight else None
        scratch = _scratch(hidden, shard.valid_rows, ctx.chunk_size)
        for chunk in _chunks(shard.valid_rows, ctx.chunk_size):
            logits = _chunk_logits(hidden, weight, ctx.rules, chunk, scratch)
            slope = ctx.rules.slope(logits)
            grad_logits = logits_grad(logits, log_sum_exp, local - chunk.start, grad)
            grad_logits = (grad_logits if slope is None else grad_logits.mul_(slope)).to(weight.dtype)
            if grad_hidden is not None:
                add_product(grad_hidden[:num_graded], grad_logits, weight[chunk])
            if grad_weight is not None:
                grad_weight.put(chunk, grad_logits.t(), hidden)
            del logits, slope, grad_logits
        if grad_hidden is not None:
            if shard.group is not None and ctx.reduce_hidden_grad:
                dist.all_reduce(grad_hidden, group=shard.group)
            grad_hidden = grad_hidden.to(hidden.dtype)
        return grad_hidden, None if grad_weight is None else grad_weight.for_autograd(), *[None] * 7


class _LogitsLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, shard: VocabularyShard) -> Tensor:
        local = shard.local_target(target)
        statistics = LogitStatistics.empty(logits, logits.shape[0])
        if shard.valid_rows:
            statistics.add(_own_copy(logits[:, : shard.valid_rows]), local)
        logprobs, log_sum_exp = shard.combine(statistics)
        ctx.save_for_backward(logits, local, log_sum_exp)
        ctx.shard = shard
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        logits, local, log_sum_exp = ctx.saved_tensors
        valid_rows = ctx.shard.valid_rows
        grad_logits = torch.zeros_like(logits)
        if valid_rows:
            grad_logits[:, :valid_rows] = logits_grad(_own_copy(logits[:, :valid_rows]), log_sum_exp, local, grad)
        return grad_logits, None, None


def _own_copy(logits: Tensor) -> Tensor:
    # What is computed overwrites them, and the caller's are not ours to change.
    return logits.to(accumulation_dtype(logits.dtype), copy=True)


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _scratch(hidden: Tensor, rows: int, chunk_size: int) -> Tensor | None:
    """Memory for the logits of one chunk, the same for all: the CPU's allocator would fetch and clear new pages for each.

    None where products are of another dtype than the logits and cannot be written there.
    """
    if hidden.dtype != accumulation_dtype(hidden.dtype):
        return None
    return hidden.new_empty(hidden.shape[0] * min(rows, chunk_size))


def _logits_to_score(
    hidden: Tensor, weight: Tensor, rules: LogitRules, reference: ReferenceHead | None, chunk: slice, scratch: Tensor | None
) -> Iterator[tuple[int, Tensor]]:
    """(row of the result, logits of a chunk that may be overwritten): the policy's; with a reference its own and two mixtures."""
    policy = _chunk_logits(hidden, weight, rules, chunk, scratch)
    if reference is not None:
        other = _chunk_logits(reference.hidden, reference.weight, reference.rules, chunk)
        # Where both models agree to the bit, so do the mixtures. One mixture exists at a time.
        yield 2, torch.lerp(policy, other, -reference.epsilon)
        yield 3, torch.lerp(policy, other, reference.epsilon)
        yield 1, other
    yield 0, policy


def _chunk_logits(hidden: Tensor, weight: Tensor, rules: LogitRules, chunk: slice, scratch: Tensor | None = None) -> Tensor:
    shape = (hidden.shape[0], chunk.stop - chunk.start)
    out = None if scratch is None else scratch[: shape[0] * shape[1]].view(shape)
    return rules.apply_(product(hidden, weight[chunk].t(), out=out))
