"""The part of a vocabulary that one tensor-parallel rank holds, and what its logits say of the log-probs of targets.

Shape letters: N scored tokens, C vocabulary entries of one chunk.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rmipo.model.products import accumulation_dtype


class VocabularyShard:
    """Which ids of the vocabulary this rank holds.

    Args:
        rows: of this rank's shard of the output layer, the same on every rank.
        vocab_size: real vocabulary size; rows from there on are padding. None: there is no padding.
        group: the tensor-parallel group; None for an unsharded vocabulary.

    Attributes:
        group: the group, None where it holds one rank.
        vocab_start_index: the id of the first row.
        valid_rows: rows that are not padding.
    """

    def __init__(self, rows: int, vocab_size: int | None, group: dist.ProcessGroup | None) -> None:
        self.group = group if group is not None and group.size() > 1 else None
        self.vocab_start_index = rows * (self.group.rank() if self.group is not None else 0)
        # Padding sits at the end of the vocabulary: on the last ranks, and possibly on the whole of them.
        total = rows * (self.group.size() if self.group is not None else 1) if vocab_size is None else vocab_size
        self.valid_rows = min(max(total - self.vocab_start_index, 0), rows)

    def local_target(self, target: Tensor) -> Tensor:
        """Row of each target in this shard, -1 where another rank holds it, int64 ``[N]``."""
        local = target - self.vocab_start_index
        return torch.where((local >= 0) & (local < self.valid_rows), local, -1)

    def largest(self, values: Tensor, ids: Tensor) -> Tensor:
        """The id of the largest value of all ranks, int64 ``[N]``; of equal ones the lowest. The group calls it together.

        Args:
            values: ``[N]``, the largest of this rank.
            ids: int64 ``[N]``, where in the whole vocabulary it stands.
        """
        if self.group is None:
            return ids
        most = values.clone()
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
        ids = torch.where(values == most, ids, torch.iinfo(torch.int64).max)
        dist.all_reduce(ids, op=dist.ReduceOp.MIN, group=self.group)
        return ids

    def combine(self, statistics: LogitStatistics) -> tuple[Tensor, Tensor]:
        """(log-prob, log-sum-exp), of the statistics' own shape: one max and one sum over the group, which calls it together."""
        maximum, sum_exp, target_logit = statistics.maximum, statistics.sum_exp, statistics.target_logit
        if self.group is not None:
            local_maximum, maximum = maximum, maximum.clone()
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=self.group)
            sums = torch.stack([sum_exp * (local_maximum - maximum).exp(), target_logit])
            dist.all_reduce(sums, group=self.group)
            sum_exp, target_logit = sums[0], sums[1]
        log_sum_exp = maximum + sum_exp.log()
        return target_logit - log_sum_exp, log_sum_exp


@dataclasses.dataclass(frozen=True)
class TokenChoice:
    """How the next token of a sequence is chosen: the likeliest one, or one drawn from the softmax of ``logits / temperature``.

    What is drawn depends on the seed, the sequence and the place in it alone: it is the same at every layout, as far as logits
    are. The likeliest of logits with Gumbel noise is one drawn from their softmax (Gumbel 1954; Maddison et al. 2014).

    Attributes:
        temperature: 0 for the likeliest.
        seed: of the noise.
        vocab_size: real vocabulary size.
        places: of each of the N tokens (number of its sequence, place in it).
    """

    temperature: float
    seed: int
    vocab_size: int
    places: tuple[tuple[int, int], ...] = ()

    def at(self, places: Iterable[tuple[int, int]]) -> TokenChoice:
        """The same for other tokens."""
        return dataclasses.replace(self, places=tuple(places))

    def noise(self, shard: VocabularyShard, like: Tensor) -> Tensor | None:
        """``[N, valid rows]`` of this rank, to be added to ``logits / temperature``; None where nothing is drawn."""
        if self.temperature == 0.0:
            return None
        own = slice(shard.vocab_start_index, shard.vocab_start_index + shard.valid_rows)
        rows = [self._uniform(*place)[own] for place in self.places]
        drawn = torch.stack(rows) if rows else torch.zeros(0, shard.valid_rows)
        return drawn.clamp_(min=torch.finfo(drawn.dtype).tiny).log_().neg_().log_().neg_().to(like.device)

    def _uniform(self, number: int, place: int) -> Tensor:
        digest = hashlib.blake2b(f"{self.seed} {number} {place}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        return torch.rand(self.vocab_size, generator=generator)


@dataclasses.dataclass(frozen=True)
class LogitRules:
    """What some models do to the product of hidden states and head, before it is their logits.

    Attributes:
        multiplier: of the product.
        softcap: logits z, multiplied, become ``cap * tanh(z / cap)``; None leaves them.
    """

    multiplier: float = 1.0
    softcap: float | None = None

    def apply_(self, product: Tensor) -> Tensor:
        """Logits, in the place of the product."""
        if self.softcap is None:
            return product if self.multiplier == 1.0 else product.mul_(self.multiplier)
        return product.mul_(self.multiplier / self.softcap).tanh_().mul_(self.softcap)

    def slope(self, logits: Tensor) -> Tensor | float | None:
        """The derivative of the logits by the product, from the logits; None where it is 1."""
        if self.softcap is None:
            return None if self.multiplier == 1.0 else self.multiplier
        return (logits / self.softcap).square_().neg_().add_(1.0).mul_(self.multiplier)


PLAIN_LOGITS = LogitRules()


@dataclasses.dataclass(frozen=True)
class LogitStatistics:
    """What a shard's logits say of each token's log-prob, gathered chunk by chunk; fp32 (fp64 for fp64 inputs) ``[..., N]`` each.

    Attributes:
        maximum: largest logit.
        sum_exp: sum of exp(logit - maximum).
        target_logit: the target's logit, 0 where another rank holds it.
    """

    maximum: Tensor
    sum_exp: Tensor
    target_logit: Tensor

    @classmethod
    def empty(cls, like: Tensor, *shape: int) -> LogitStatistics:
        """Those of no logits at all."""
        zeros = like.new_zeros(2, *shape, dtype=accumulation_dtype(like.dtype))
        return cls(torch.full_like(zeros[0], float("-inf")), zeros[0], zeros[1])

    def __getitem__(self, row: int) -> LogitStatistics:
        """A view of one row."""
        return LogitStatistics(self.maximum[row], self.sum_exp[row], self.target_logit[row])

    def add(self, logits: Tensor, local: Tensor) -> None:
        """Take in ``[N, C]`` logits, which are overwritten; ``local [N]``: the target's column, outside of C in other chunks."""
        inside = (local >= 0) & (local < logits.shape[1])
        self.target_logit.add_(torch.where(inside, logits.gather(1, torch.where(inside, local, 0)[:, None])[:, 0], 0.0))
        maximum = torch.maximum(self.maximum, logits.amax(dim=1))
        self.sum_exp.mul_((self.maximum - maximum).exp_()).add_(logits.sub_(maximum[:, None]).exp_().sum(dim=1))
        self.maximum.copy_(maximum)


def logits_grad(logits: Tensor, log_sum_exp: Tensor, local: Tensor, grad: Tensor) -> Tensor:
    """``grad * (onehot(target) - softmax)`` of ``[N, C]`` logits, which are overwritten; ``local`` is that of LogitStatistics."""
    inside = (local >= 0) & (local < logits.shape[1])
    grad_logits = logits.sub_(log_sum_exp[:, None]).exp_().mul_(-grad[:, None])
    return grad_logits.scatter_add_(1, torch.where(inside, local, 0)[:, None], torch.where(inside, grad, 0.0)[:, None])
