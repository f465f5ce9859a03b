"""Ways to get log-probs of target tokens out of hidden states and the output layer's weight: ours and others'.

Shape letters: T tokens of a row, N scored ones among them, H hidden, V vocabulary, tp tensor-parallel size.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor

from megatron_rmipo.model.logprobs import linear_logprobs


@dataclasses.dataclass(frozen=True)
class Problem:
    """Inputs that all methods read, fp32, the same on every rank but for the weight.

    Attributes:
        hidden: ``[T, H]``, with gradient.
        weight: ``[V / tp, H]``, this rank's rows, with gradient.
        target: int64 ``[T]``.
        scored: int64 ``[N]``, ascending positions in ``[0, T)``.
        grad: ``[N]``, the gradient that comes back for the log-probs.
        group: the tensor-parallel group.
        chunk_size: of our own method.
    """

    hidden: Tensor
    weight: Tensor
    target: Tensor
    scored: Tensor
    grad: Tensor
    group: dist.ProcessGroup
    chunk_size: int


# Log-probs of the scored tokens, fp32 [N].
Method = Callable[[Problem], Tensor]


def random_problem(
    *,
    tokens: int,
    vocab_size: int,
    hidden_size: int,
    scored_share: float,
    chunk_size: int,
    group: dist.ProcessGroup,
    seed: int,
) -> Problem:
    """Logits of standard deviation 2; the first tokens of the row are not scored, as those of a prompt."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(seed)
    rows = vocab_size // group.size()
    weight = torch.randn(vocab_size, hidden_size, generator=generator)[group.rank() * rows :][:rows].clone()
    num_scored = max(1, round(scored_share * tokens))
    return Problem(
        hidden=torch.randn(tokens, hidden_size, generator=generator).mul_(2 / hidden_size**0.5).to(device).requires_grad_(),
        weight=weight.to(device).requires_grad_(),
        target=torch.randint(vocab_size, (tokens,), generator=generator).to(device),
        scored=torch.arange(tokens - num_scored, tokens, device=device),
        grad=torch.randn(num_scored, generator=generator).to(device),
        group=group,
        chunk_size=chunk_size,
    )


def fused(problem: Problem) -> Tensor:
    """Ours: scored tokens, chunk by chunk, logits made again in backward."""
    hidden, target = problem.hidden[problem.scored], problem.target[problem.scored]
    return linear_logprobs(hidden, problem.weight, target, problem.group, chunk_size=problem.chunk_size)


def dense_all_tokens(problem: Problem) -> Tensor:
    """Plain torch over the whole row; what is not scored is dropped after."""
    logprobs = torch.log_softmax(problem.hidden @ problem.weight.t(), dim=-1)
    return logprobs.gather(-1, problem.target[:, None])[:, 0][problem.scored]


def dense_scored_tokens(problem: Problem) -> Tensor:
    """Plain torch over the scored tokens."""
    logprobs = torch.log_softmax(problem.hidden[problem.scored] @ problem.weight.t(), dim=-1)
    return logprobs.gather(-1, problem.target[problem.scored][:, None])[:, 0]


def megatron_scored_tokens(problem: Problem) -> Tensor:
    """Megatron's vocabulary-parallel cross entropy over the scored tokens."""
    logits = copy_to_tensor_model_parallel_region(problem.hidden[problem.scored]) @ problem.weight.t()
    return -vocab_parallel_cross_entropy(logits, problem.target[problem.scored])


def liger(problem: Problem) -> Tensor:
    """Liger's fused linear cross entropy over the scored tokens."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")
    negative: Tensor = loss(problem.weight, problem.hidden[problem.scored], problem.target[problem.scored])
    return -negative


def cut_cross_entropy(problem: Problem) -> Tensor:
    """Apple's cut cross entropy over the scored tokens, gradients without its filter of small ones."""
    from cut_cross_entropy import linear_cross_entropy

    negative: Tensor = linear_cross_entropy(
        problem.hidden[problem.scored], problem.weight, problem.target[problem.scored], reduction="none", impl="cce_exact"
    )
    return -negative


def methods(tensor_parallel_size: int) -> dict[str, Method]:
    """The methods that can run here, by name, ours first."""
    found: dict[str, Method] = {"fused": fused}
    if tensor_parallel_size == 1:
        found |= {"dense, all tokens": dense_all_tokens, "dense, scored": dense_scored_tokens}
    found["megatron, scored"] = megatron_scored_tokens
    # Triton kernels: they need a GPU.
    if tensor_parallel_size == 1 and torch.cuda.is_available():
        installed = {
            "liger_kernel": ("liger, scored", liger),
            "cut_cross_entropy": ("cut-cross-entropy, scored", cut_cross_entropy),
        }
        found |= {name: method for package, (name, method) in installed.items() if importlib.util.find_spec(package)}
    return found
