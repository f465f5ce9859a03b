"""Whether a Megatron model computes what transformers computes from the Hugging Face checkpoint it came from.

Shape letters: T tokens of a text, V vocabulary, tp tensor-parallel size, H hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rmipo.model.packed_model import Chunks, chunks_of, head_weight
from megatron_rmipo.runtime.agreement import on_each_rank_alone
from megatron_rmipo.runtime.groups import ProcessGroups, current_device


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How close two models' logits are.

    Attributes:
        num_tokens: positions compared.
        max_difference: greatest absolute difference of two logits.
        mean_kl: mean of KL(transformers || Megatron) over positions, in nats.
        top1: share of positions whose most likely token is the same.
    """

    num_tokens: int
    max_difference: float
    mean_kl: float
    top1: float


@torch.no_grad()
def policy_logits(policy: Chunks, token_ids: Tensor, groups: ProcessGroups) -> Tensor | None:
    """Logits of one text, through every stage. All ranks of one model replica call it together.

    Args:
        policy: this rank's part of the model, or its chunks.
        token_ids: int64 ``[T]``.
        groups: the process groups of this rank.

    Returns:
        fp32 ``[T, V]`` on the CPU on the first tensor-parallel rank of the last stage, None elsewhere.
    """
    chunks: list[Any] = chunks_of(policy)
    config = chunks[0].config
    num_tokens, shards = token_ids.numel(), groups.tp_size if config.sequence_parallel else 1
    padding = -num_tokens % shards
    tokens, source = F.pad(token_ids, (0, padding)), torch.arange(num_tokens, device=token_ids.device)
    # Padding is a segment of its own, which no token of the text attends to.
    segments = torch.tensor([[0, num_tokens, 0, 0], [num_tokens, padding, 0, 0]][: 2 if padding else 1], dtype=torch.int64)
    for chunk in chunks:
        if not chunk.pre_process:
            shape = (tokens.numel() // shards, 1, config.hidden_size)
            hidden = torch.empty(shape, dtype=config.params_dtype, device=token_ids.device)
            dist.recv(hidden, group=groups.pp, group_src=(groups.pp_rank - 1) % groups.pp_size)
            chunk.set_input_tensor([hidden])
        output = chunk(tokens, torch.arange(tokens.numel(), device=token_ids.device), segments, source, None)
        if not chunk.post_process:
            dist.send(output.contiguous(), group=groups.pp, group_dst=(groups.pp_rank + 1) % groups.pp_size)
    last = chunks[-1]
    if not last.post_process:
        return None
    logits = last.scoring_options.logits.apply_(F.linear(output, head_weight(last)))
    parts = [torch.empty_like(logits) for _ in range(groups.tp_size)] if groups.tp_rank == 0 else None
    dist.gather(logits, parts, group=groups.tp, group_dst=0)
    return None if parts is None else torch.cat(parts, dim=-1)[:, : last.architecture.vocab_size].float().cpu()


def compare_with_transformers(
    policy: Chunks, hf_dir: Path, texts: Sequence[Tensor], groups: ProcessGroups, dtype: torch.dtype
) -> Agreement:
    """Compare the policy's logits with those of transformers. All ranks of one model replica call it together.

    Args:
        policy: this rank's part of the model, or its chunks.
        hf_dir: what transformers loads, on one rank.
        texts: int64 ``[T]`` each, the same on every rank.
        groups: the process groups of this rank.
        dtype: dtype transformers computes in.

    Returns:
        The agreement, the same on every rank.
    """
    for chunk in chunks_of(policy):
        chunk.eval()
    compares = groups.is_last_stage and groups.tp_rank == 0
    # Of a large model either may take longer than the others wait in a collective.
    reference = on_each_rank_alone(groups.world, lambda: _load_reference(hf_dir, dtype) if compares else None)
    results = []
    for token_ids in texts:
        logits = policy_logits(policy, token_ids.to(current_device()), groups)
        compare = partial(_compare_logits, reference, token_ids, logits)
        if (result := on_each_rank_alone(groups.world, compare)) is not None:
            results.append(result)
    outcome = [_summarize(results) if compares else None]
    if groups.is_last_stage:
        dist.broadcast_object_list(outcome, group=groups.tp, group_src=0)
    dist.broadcast_object_list(outcome, group=groups.pp, group_src=groups.pp_size - 1)
    agreement = outcome[0]
    assert agreement is not None
    return agreement


def _load_reference(hf_dir: Path, dtype: torch.dtype) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=dtype, local_files_only=True)
    return model.to(current_device()).eval()


def _compare_logits(reference: Any, token_ids: Tensor, logits: Tensor | None) -> tuple[int, float, float, int] | None:
    return None if logits is None else _compare(_reference_logits(reference, token_ids), logits)


@torch.no_grad()
def _reference_logits(model: Any, token_ids: Tensor) -> Tensor:
    logits: Tensor = model(token_ids[None].to(current_device()), use_cache=False).logits
    return logits[0].float().cpu()


def _compare(expected: Tensor, found: Tensor) -> tuple[int, float, float, int]:
    """(tokens, max difference, sum of KL, tokens with the same top 1)."""
    # In float64, where rounding does not make a divergence of nothing negative.
    expected_logps, found_logps = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    divergence = (expected_logps.exp() * (expected_logps - found_logps)).sum()
    same = (expected.argmax(-1) == found.argmax(-1)).sum()
    # A NaN on either side is the worst difference there is; max() alone might skip it.
    difference = (expected - found).abs().nan_to_num(nan=torch.inf).max()
    return expected.shape[0], float(difference), float(divergence), int(same)


def _summarize(results: Sequence[tuple[int, float, float, int]]) -> Agreement:
    num_tokens = sum(tokens for tokens, _, _, _ in results)
    return Agreement(
        num_tokens=num_tokens,
        max_difference=max(difference for _, difference, _, _ in results),
        mean_kl=sum(divergence for _, _, divergence, _ in results) / num_tokens,
        top1=sum(same for _, _, _, same in results) / num_tokens,
    )
