"""RMiPO and SimPO the plain way, on transformers and torch alone: padded pairs, fp32 logits of every token.

What most preference trainers do, written here without anything of ours, so that it checks results as well as speed. The pairs of
a micro-batch are padded to their longest sequence, chosen and rejected with the prompt each; RMiPO (its default preset) takes a
second padded pass for log p(y).

Shape letters: P pairs of a micro-batch, B = 2P sequences, L longest of them, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Pair = tuple[list[int], list[int], list[int]]
ObjectiveName = Literal["rmipo", "simpo"]


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step gave: losses of all pairs in their order, gradient norm before clipping."""

    losses: Tensor
    grad_norm: float


class PaddedBaseline:
    """One optimizer step over padded sequences.

    Args:
        model: a causal language model of transformers, fp32 weights, on the device to run on.
        objective: ``rmipo`` or ``simpo``.
        bos_token_id: stands before a response in log p(y).
        pairs_per_microbatch: how many pairs are padded to one length; gradients are accumulated over micro-batches.
        bf16: compute under bfloat16 autocast; logits and log-probs are fp32 all the same.
        learning_rate, max_grad_norm: of Adam with betas 0.9 and 0.999, and of clipping.
    """

    beta, gamma_min, gamma_max = 2.0, 0.3, 1.6
    simpo_gamma = 0.5

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        objective: ObjectiveName = "rmipo",
        bos_token_id: int,
        pairs_per_microbatch: int,
        bf16: bool = False,
        learning_rate: float = 1e-4,
        max_grad_norm: float = 1.0,
    ) -> None:
        self.model = model
        self.objective = objective
        self.bos_token_id = bos_token_id
        self.pairs_per_microbatch = pairs_per_microbatch
        self.bf16 = bf16
        self.max_grad_norm = max_grad_norm
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    def step(self, pairs: Sequence[Pair]) -> StepResult:
        """Forward, backward, clip, update."""
        # Kept between steps, as ours are, so that both hold weights, gradients and two moments.
        self.optimizer.zero_grad(set_to_none=False)
        losses = []
        for first in range(0, len(pairs), self.pairs_per_microbatch):
            part = self.losses(pairs[first : first + self.pairs_per_microbatch])
            (part.sum() / len(pairs)).backward()  # type: ignore[no-untyped-call]
            losses.append(part.detach())
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        return StepResult(torch.cat(losses).cpu(), float(grad_norm))

    def losses(self, pairs: Sequence[Pair]) -> Tensor:
        """Losses of a micro-batch, ``[P]``."""
        responses = [pair[1] for pair in pairs] + [pair[2] for pair in pairs]
        prompts = [pair[0] for pair in pairs] * 2
        logps = self._response_logps(prompts, responses)
        lengths = torch.tensor([len(response) for response in responses], device=logps.device)
        chosen, rejected = (self.beta * logps / lengths).chunk(2)
        margin = self._margins(responses, logps.detach(), lengths) if self.objective == "rmipo" else self.simpo_gamma
        return -torch.nn.functional.logsigmoid(chosen - rejected - margin)

    @torch.no_grad()
    def _margins(self, responses: list[list[int]], logps: Tensor, lengths: Tensor) -> Tensor:
        """RMiPO's margin of each pair, ``[P]``, from log p(y | x) and the tokens of its responses, ``[B]`` each."""
        uncond = self._response_logps([[self.bos_token_id]] * len(responses), responses)
        chosen_pmi, rejected_pmi = ((logps - uncond) / lengths).chunk(2)
        decay = torch.exp(-torch.clamp(chosen_pmi - rejected_pmi, min=0.0))
        return self.gamma_min + (self.gamma_max - self.gamma_min) * decay

    def _response_logps(self, contexts: list[list[int]], responses: list[list[int]]) -> Tensor:
        """Sum of log-probs of each response behind its context, ``[B]``, from logits ``[B, L, V]``."""
        longest = max(len(context) + len(response) for context, response in zip(contexts, responses, strict=True))
        token_ids = torch.zeros(len(responses), longest, dtype=torch.int64)
        attention_mask, scored = torch.zeros_like(token_ids), torch.zeros(token_ids.shape)
        for row, (context, response) in enumerate(zip(contexts, responses, strict=True)):
            end = len(context) + len(response)
            token_ids[row, :end] = torch.tensor(context + response)
            attention_mask[row, :end] = 1
            scored[row, len(context) : end] = 1.0
        device = next(self.model.parameters()).device
        token_ids, attention_mask, scored = token_ids.to(device), attention_mask.to(device), scored.to(device)
        autocast = torch.autocast(device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()
        with autocast:
            logits = self.model(input_ids=token_ids, attention_mask=attention_mask, use_cache=False).logits
        logps = torch.log_softmax(logits[:, :-1].float(), dim=-1)
        picked = torch.gather(logps, 2, token_ids[:, 1:, None]).squeeze(2)
        return (picked * scored[:, 1:]).sum(1)
