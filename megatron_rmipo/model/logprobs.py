"""Log-probabilities over a vocabulary sharded by tensor parallelism, without ever holding ``[tokens, vocab/tp]`` logits at once.

Shape letters: N scored tokens, H hidden, V full vocabulary, tp tensor-parallel size, C tokens of one chunk.

Three forms:

* :func:`linear_logprobs` fuses the output layer with the log-prob: hidden states and the weight shard in, ``[N]`` log-probs out.
* :func:`perturbed_linear_logprobs` also scores the targets under mixtures of these logits and a reference model's.
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


@dataclasses.dataclass(frozen=True)
class ReferenceHead:
    """What of a frozen reference model is needed to mix its logits with the policy's.

    Attributes:
        hidden: ``[N, H']``, its hidden states of the same scored tokens, without gradient; replicated over the group.
        weight: ``[V_padded / tp, H']``, this rank's rows of its output layer, sharded like the policy's.
        epsilon: share of the reference in a mixture.
    """

    hidden: Tensor
    weight: Tensor
    epsilon: float


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    vocab_size: int | None = None,
    chunk_tokens: int = 1024,
    reduce_hidden_grad: bool = True,
) -> Tensor:
    """Log-probability of each target under ``softmax(hidden @ weight.T)``, the vocabulary sharded over ``group``.

    Equivalent, on one rank, to
    ``torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, target[:, None])[:, 0]``.

    Every rank of ``group`` must call it together, with the same hidden states and targets.

    Args:
        hidden: ``[N, H]``, any floating dtype; replicated over the group.
        weight: ``[V_padded / tp, H]``, this rank's rows of the output layer, in rank order.
        target: int64 ``[N]``, ids in ``[0, vocab_size)``.
        group: the tensor-parallel group; None for an unsharded vocabulary.
        vocab_size: real vocabulary size; rows of the weight from there on are padding and count as probability zero.
        chunk_tokens: logits are made for this many tokens at a time, forward and backward.
        reduce_hidden_grad: whether the gradient of ``hidden`` is summed over the group here. Pass False where the caller's
            own backward does that, such as a gather from a sequence-parallel region.

    Returns:
        fp32 ``[N]``, replicated over the group.
    """
    assert hidden.dim() == 2, hidden.shape
    assert target.shape == hidden.shape[:1], (hidden.shape, target.shape)
    shard = _VocabularyShard(weight.shape[0], vocab_size, group)
    function: Any = _LinearLogprobs
    logprobs: Tensor = function.apply(hidden, weight, target, shard, chunk_tokens, reduce_hidden_grad, None)
    return logprobs[0]


def perturbed_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    reference: ReferenceHead,
    group: dist.ProcessGroup | None = None,
    *,
    vocab_size: int | None = None,
    chunk_tokens: int = 1024,
    reduce_hidden_grad: bool = True,
) -> Tensor:
    """Log-probability of each target under the logits f of the policy, r of a reference, and two mixtures of them.

    Arguments and who calls it together are those of :func:`linear_logprobs`. All four normalizers come from the same chunks of
    logits and share the two collectives; neither model's ``[N, V]`` logits are ever whole or gathered.

    Returns:
        fp32 ``[4, N]``, replicated over the group: the log-probability under ``f``, ``r``, ``(1 + epsilon) f - epsilon r`` and
        ``(1 - epsilon) f + epsilon r``. Only the first row carries gradient.
    """
    assert hidden.shape[0] == reference.hidden.shape[0], (hidden.shape, reference.hidden.shape)
    assert weight.shape[0] == reference.weight.shape[0], (weight.shape, reference.weight.shape)
    shard = _VocabularyShard(weight.shape[0], vocab_size, group)
    function: Any = _LinearLogprobs
    logprobs: Tensor = function.apply(hidden, weight, target, shard, chunk_tokens, reduce_hidden_grad, reference)
    return logprobs


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
    shard = _VocabularyShard(logits.shape[-1], vocab_size, group)
    function: Any = _LogitsLogprobs
    flat: Tensor = function.apply(logits.flatten(0, -2), target.flatten(), shard)
    return flat.view(target.shape)


class _VocabularyShard:
    """Which ids of the vocabulary this rank holds."""

    def __init__(self, rows: int, vocab_size: int | None, group: dist.ProcessGroup | None) -> None:
        self.group = group if group is not None and group.size() > 1 else None
        self.vocab_start_index = rows * (self.group.rank() if self.group is not None else 0)
        # Padding sits at the end of the vocabulary: on the last ranks, and possibly on the whole of them.
        total = rows * (self.group.size() if self.group is not None else 1) if vocab_size is None else vocab_size
        self.valid_rows = min(max(total - self.vocab_start_index, 0), rows)

    def local_target(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """(row of each target, clamped into the shard; whether the shard holds it), both ``[N]``."""
        local = target - self.vocab_start_index
        held = (local >= 0) & (local < self.valid_rows)
        return torch.where(held, local, 0), held

    def chunk_statistics(self, logits: Tensor, local: Tensor, held: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Local (max, sum of exp(logit - max), target logit or 0) of fp32 ``[C, valid_rows]`` logits, each ``[C]``."""
        if logits.shape[1] == 0:
            minus_infinity = logits.new_full((logits.shape[0],), float("-inf"))
            return minus_infinity, torch.zeros_like(minus_infinity), torch.zeros_like(minus_infinity)
        maximum = logits.amax(dim=1)
        target_logit = torch.where(held, logits.gather(1, local[:, None])[:, 0], 0.0)
        return maximum, (logits - maximum[:, None]).exp_().sum(dim=1), target_logit

    def combine(self, maximum: Tensor, sum_exp: Tensor, target_logit: Tensor) -> tuple[Tensor, Tensor]:
        """(log-prob, log-sum-exp), of the statistics' own shape: one max and one sum over the group."""
        if self.group is not None:
            local_maximum, maximum = maximum, maximum.clone()
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=self.group)
            sums = torch.stack([sum_exp * (local_maximum - maximum).exp(), target_logit])
            dist.all_reduce(sums, group=self.group)
            sum_exp, target_logit = sums[0], sums[1]
        log_sum_exp = maximum + sum_exp.log()
        return target_logit - log_sum_exp, log_sum_exp

    def logits_grad(self, logits: Tensor, log_sum_exp: Tensor, local: Tensor, held: Tensor, grad: Tensor) -> Tensor:
        """``grad * (onehot(target) - softmax)`` of fp32 ``[C, valid_rows]`` logits, which are overwritten."""
        softmax = logits.sub_(log_sum_exp[:, None]).exp_()
        grad_logits = softmax.mul_(-grad[:, None])
        if grad_logits.shape[1]:
            grad_logits.scatter_add_(1, local[:, None], torch.where(held, grad, 0.0)[:, None])
        return grad_logits


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        shard: _VocabularyShard,
        chunk_tokens: int,
        reduce_hidden_grad: bool,
        reference: ReferenceHead | None,
    ) -> Tensor:
        local, held = shard.local_target(target)
        num_rows = 1 if reference is None else 4
        statistics = hidden.new_empty(3, num_rows, hidden.shape[0], dtype=_accumulation_dtype(hidden.dtype))
        for chunk in _chunks(hidden.shape[0], chunk_tokens):
            for row, logits in enumerate(_logits_to_score(hidden, weight, reference, shard, chunk)):
                for part, values in enumerate(shard.chunk_statistics(logits, local[chunk], held[chunk])):
                    statistics[part, row, chunk] = values
        logprobs, log_sum_exp = shard.combine(*statistics)
        ctx.save_for_backward(hidden, weight, local, held, log_sum_exp[0])
        ctx.shard, ctx.chunk_tokens, ctx.reduce_hidden_grad = shard, chunk_tokens, reduce_hidden_grad
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad_outputs[0][0]
        hidden, weight, local, held, log_sum_exp = ctx.saved_tensors
        shard: _VocabularyShard = ctx.shard
        valid_weight = weight[: shard.valid_rows]
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden, dtype=_accumulation_dtype(hidden.dtype)) if needs_hidden else None
        # Summed over chunks in fp32: in bf16 each chunk would round away part of the ones before it.
        grad_weight = torch.zeros_like(weight, dtype=_accumulation_dtype(weight.dtype)) if needs_weight else None
        for chunk in _chunks(hidden.shape[0], ctx.chunk_tokens):
            logits = _chunk_logits(hidden, weight, shard, chunk)
            grad_logits = shard.logits_grad(logits, log_sum_exp[chunk], local[chunk], held[chunk], grad[chunk])
            grad_logits = grad_logits.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = (grad_logits @ valid_weight).to(grad_hidden.dtype)
            if grad_weight is not None:
                grad_weight[: shard.valid_rows] += grad_logits.t() @ hidden[chunk]
        if grad_hidden is not None:
            if shard.group is not None and ctx.reduce_hidden_grad:
                dist.all_reduce(grad_hidden, group=shard.group)
            grad_hidden = grad_hidden.to(hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


class _LogitsLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, shard: _VocabularyShard) -> Tensor:
        local, held = shard.local_target(target)
        wide = logits[:, : shard.valid_rows].to(_accumulation_dtype(logits.dtype))
        logprobs, log_sum_exp = shard.combine(*shard.chunk_statistics(wide, local, held))
        ctx.save_for_backward(logits, local, held, log_sum_exp)
        ctx.shard = shard
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        logits, local, held, log_sum_exp = ctx.saved_tensors
        shard: _VocabularyShard = ctx.shard
        grad_logits = torch.zeros_like(logits)
        # A fresh copy: logits_grad overwrites, and the caller's logits are not ours to change.
        wide = logits[:, : shard.valid_rows].to(_accumulation_dtype(logits.dtype), copy=True)
        grad_logits[:, : shard.valid_rows] = shard.logits_grad(wide, log_sum_exp, local, held, grad).to(logits.dtype)
        return grad_logits, None, None


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _logits_to_score(
    hidden: Tensor, weight: Tensor, reference: ReferenceHead | None, shard: _VocabularyShard, chunk: slice
) -> Iterator[Tensor]:
    """The policy's logits of a chunk; with a reference also its own, and the two mixtures. One mixture exists at a time."""
    policy = _chunk_logits(hidden, weight, shard, chunk)
    yield policy
    if reference is not None:
        other = _chunk_logits(reference.hidden, reference.weight, shard, chunk)
        yield other
        # Where both models agree to the bit, so do the mixtures.
        yield torch.lerp(policy, other, -reference.epsilon)
        yield torch.lerp(policy, other, reference.epsilon)


def _chunk_logits(hidden: Tensor, weight: Tensor, shard: _VocabularyShard, chunk: slice) -> Tensor:
    # The product runs in the model's dtype, all that follows in fp32.
    logits = hidden[chunk] @ weight[: shard.valid_rows].t()
    return logits.to(_accumulation_dtype(logits.dtype))
