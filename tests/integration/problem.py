"""One small problem, shared by the multi-process tests: a Hugging Face Llama, 24 pairs, and the dense float64 answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rmipo.data.loader import PairCollection
from megatron_rmipo.data.pair_store import TokenizedPair
from megatron_rmipo.objectives.base import Objective, PairLogps

BOS = 1
VOCAB = 83  # not a multiple of anything a layout could want
NUM_PAIRS = 24


class PairList:
    """Pairs in memory, in the place of a PairStore."""

    prefix = "memory"

    def __init__(self, pairs: Sequence[TokenizedPair]) -> None:
        self.pairs = list(pairs)
        self.lengths = np.array([[p.prompt.size, p.chosen.size, p.rejected.size] for p in pairs], dtype=np.int32)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> TokenizedPair:
        return self.pairs[index]


def make_pairs(count: int = NUM_PAIRS, seed: int = 5) -> list[TokenizedPair]:
    """Random pairs of odd lengths: one-token responses, equal responses and a one-token prompt among them."""
    random = np.random.default_rng(seed)

    def tokens(length: int) -> np.ndarray:
        return random.integers(3, VOCAB, size=length)

    pairs = []
    for number in range(count):
        prompt = np.concatenate([[BOS], tokens(int(random.integers(1, 18)))])
        chosen, rejected = tokens(int(random.integers(2, 14))), tokens(int(random.integers(2, 14)))
        if number == 3:
            chosen = chosen[:1]
        if number == 7:
            chosen, rejected = chosen[:1], rejected[:1]
        if number == 11:
            rejected = chosen.copy()
        if number == 13:
            prompt = prompt[:1]
        pairs.append(TokenizedPair(prompt, chosen, rejected))
    return pairs


def collection(pairs: Sequence[TokenizedPair]) -> PairCollection:
    return PairCollection([PairList(pairs)])  # type: ignore[list-item]


def make_hf_model(directory: Path, *, tied: bool = False, layers: int = 4, seed: int = 0, **changes: Any) -> Path:
    """Save a small random Hugging Face Llama with its config; returns the directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 104,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "bos_token_id": BOS,
        "eos_token_id": 2,
        "attention_bias": False,
        "initializer_range": 0.08,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).to(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


def dense_answer(
    hf_dir: Path, pairs: Sequence[TokenizedPair], objective: Objective
) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """(loss, gradient by Hugging Face name, metrics) in float64 by transformers, one sequence at a time, nothing packed."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(hf_dir, dtype=torch.float64, attn_implementation="eager")

    def score(context: np.ndarray, response: np.ndarray) -> Tensor:
        ids = torch.tensor(np.concatenate([context, response]))[None]
        logits = model(ids).logits[0]
        logprobs = torch.log_softmax(logits[:-1], -1).gather(-1, ids[0, 1:, None])[:, 0]
        return logprobs[max(len(context) - 1, 0) :].sum()

    conditional = torch.stack([torch.stack([score(p.prompt, p.chosen), score(p.prompt, p.rejected)]) for p in pairs])
    lengths = torch.tensor([[p.chosen.size, p.rejected.size] for p in pairs], dtype=torch.float64)
    extra: dict[str, Tensor] = {}
    context = objective.needs.unconditional
    if context is not None:
        with torch.no_grad():
            before = np.array([BOS] if context == "bos" else [], dtype=np.int64)
            alone = torch.stack([torch.stack([score(before, p.chosen), score(before, p.rejected)]) for p in pairs])
        scored = lengths - (0 if context == "bos" else 1)
        extra = {
            "uncond_chosen_logps": alone[:, 0],
            "uncond_rejected_logps": alone[:, 1],
            "uncond_chosen_lengths": scored[:, 0],
            "uncond_rejected_lengths": scored[:, 1],
        }
    output = objective(
        PairLogps(
            chosen_logps=conditional[:, 0],
            rejected_logps=conditional[:, 1],
            chosen_lengths=lengths[:, 0],
            rejected_lengths=lengths[:, 1],
            mean_chosen_length=lengths[:, 0].mean(),
            **extra,
        )
    )
    loss = output.losses.mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return float(loss.detach()), gradients, output.metrics
