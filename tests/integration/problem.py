"""One small problem, shared by the multi-process tests: Hugging Face models, 24 pairs, and the dense float64 answer."""

from __future__ import annotations

import tempfile
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.pair_store import TokenizedPair
from megatron_rmipo.objectives.base import BatchLogps, Objective, PairLogps, State
from megatron_rmipo.objectives.metrics import output_of

BOS = 1
VOCAB = 83  # not a multiple of anything a layout could want
NUM_PAIRS = 24


class PairList:
    """Pairs in memory, in the place of a PairStore."""

    prefix = "memory"
    manifest = types.SimpleNamespace(
        pair_columns=["beta", "margin", "weight"], tokenizer=types.SimpleNamespace(bos_token_id=BOS), first_token_id=BOS
    )

    def __init__(self, pairs: Sequence[TokenizedPair]) -> None:
        self.pairs = list(pairs)
        self.values = values_beside(len(self.pairs))
        self.lengths = np.array([[p.prompt.size, p.chosen.size, p.rejected.size] for p in pairs], dtype=np.int32)
        self.longest = int((self.lengths[:, 0] + self.lengths[:, 1:].max(axis=1)).max())
        self.most_tokens = 2 * self.longest

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        return self.lengths[rows]

    def prompt(self, row: int) -> np.ndarray:
        return self.pairs[row].prompt

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> TokenizedPair:
        return self.pairs[index]


def values_beside(count: int) -> np.ndarray:
    """Of each pair a beta, a margin of either sign and a weight, 0 for some; fp32 ``[count, 3]``."""
    number = np.arange(count)
    return np.stack([0.05 + 0.1 * (number % 7), 0.3 * (number % 5) - 0.4, 0.5 * (number % 4)], axis=1).astype(np.float32)


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


def unpaired(pairs: Sequence[TokenizedPair]) -> list[TokenizedPair]:
    """One response of each pair, chosen and rejected by turns of three."""
    return [
        TokenizedPair(p.prompt, p.chosen[: 0 if number % 3 else None], p.rejected[: None if number % 3 else 0])
        for number, p in enumerate(pairs)
    ]


def collection(pairs: Sequence[TokenizedPair]) -> PairCollection:
    return PairCollection([PairList(pairs)])  # type: ignore[list-item]


def make_hf_model(directory: Path, *, model_type: str = "llama", layers: int = 4, seed: int = 0, **changes: Any) -> Path:
    """Save a small random Hugging Face model with its config; returns the directory."""
    from transformers import AutoConfig, AutoModelForCausalLM

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
        "bos_token_id": BOS,
        "eos_token_id": 2,
        # transformers gives the embedding of a padding token no gradient.
        "pad_token_id": None,
        "initializer_range": 0.08,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**settings, **changes})).to(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(".bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


class DenseProblem:
    """Pairs under a policy and a reference, in float64 by transformers, one sequence at a time, nothing packed.

    Args:
        model, reference: the two, or their directories.
        pairs: the global batch; an empty response is one that the row does not have.
    """

    def __init__(self, model: Any, reference: Any, pairs: Sequence[TokenizedPair]) -> None:
        self.pairs = list(pairs)
        self.model, self.reference = (dense_model(one) if isinstance(one, Path) else one for one in (model, reference))
        self.lengths = torch.tensor([[p.chosen.size, p.rejected.size] for p in pairs], dtype=torch.float64)
        self.conditional = self._table(self.model, pairs)
        self.columns = dict(
            zip(PairList.manifest.pair_columns, torch.from_numpy(values_beside(len(self.pairs))).double().T, strict=True)
        )

    def answer(self, objective: Objective, state: State | None = None) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
        """(loss, gradient by Hugging Face name, metrics)."""
        loss, metrics = self.loss(objective, state)
        self.model.zero_grad()
        loss.backward(retain_graph=True)
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        return float(loss.detach()), _as_stored(self.model, gradients), metrics

    def loss(self, objective: Objective, state: State | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics)."""
        needs = objective.needs
        fields: dict[str, Any] = {
            "chosen_logps": self.conditional[:, 0],
            "rejected_logps": self.conditional[:, 1] if needs.rejected else torch.zeros(len(self.pairs)),
            "chosen_lengths": self.lengths[:, 0],
            "rejected_lengths": self.lengths[:, 1],
            "mean_chosen_length": self.lengths[:, 0].mean(),
            "columns": {name: self.columns[name] for name in needs.columns},
        }
        with torch.no_grad():
            fields.update(self._further_fields(objective))
            whole = BatchLogps(
                pairs=PairLogps(**fields) if needs.batch else None,
                mismatched_logps=self._table(self.model, self._mismatched()) if needs.mismatched else None,
                ref_mismatched_logps=self._table(self.reference, self._mismatched()) if needs.mismatched else None,
                has_response=torch.tensor([[p.chosen.size > 0, p.rejected.size > 0] for p in self._mismatched()]),
            )
            prepared = objective.prepare(whole, objective.initial_state() if state is None else state)
        output = output_of(objective, PairLogps(**fields, batch=prepared))
        return output.losses.mean(), output.metrics

    def _further_fields(self, objective: Objective) -> dict[str, Tensor]:
        needs, fields = objective.needs, {}
        if needs.unconditional is not None:
            before = np.array([BOS] if needs.unconditional == "bos" else [], dtype=np.int64)
            alone = self._table(self.model, [TokenizedPair(before, p.chosen, p.rejected) for p in self.pairs])
            scored = self.lengths - (0 if needs.unconditional == "bos" else 1)
            fields.update(uncond_chosen_logps=alone[:, 0], uncond_rejected_logps=alone[:, 1])
            fields.update(uncond_chosen_lengths=scored[:, 0], uncond_rejected_lengths=scored[:, 1])
        if needs.reference or needs.perturbation is not None:
            scores = self._table(self.reference, self.pairs)
            fields.update(ref_chosen_logps=scores[:, 0], ref_rejected_logps=scores[:, 1])
        for name, share in (("extrapolated", -1.0), ("interpolated", 1.0)):
            if needs.perturbation is not None:
                scores = self._table(self.model, self.pairs, share * needs.perturbation)
                fields.update({f"{name}_chosen_logps": scores[:, 0], f"{name}_rejected_logps": scores[:, 1]})
        return fields

    def _mismatched(self) -> list[TokenizedPair]:
        """Each prompt with the responses of the next pair, which in this problem always has another prompt."""
        longest = max(p.prompt.size + max(p.chosen.size, p.rejected.size) for p in self.pairs)
        following = [*self.pairs[1:], self.pairs[0]]
        return [
            TokenizedPair(p.prompt, q.chosen[: longest - p.prompt.size], q.rejected[: longest - p.prompt.size])
            for p, q in zip(self.pairs, following, strict=True)
        ]

    def _table(self, model: Any, pairs: Sequence[TokenizedPair], share: float = 0.0) -> Tensor:
        """``[P, 2]`` sums; with a share, under logits mixed with that share of the reference's."""
        rows = [[self._score(model, p.prompt, response, share) for response in (p.chosen, p.rejected)] for p in pairs]
        return torch.stack([torch.stack(row) for row in rows])

    def _score(self, model: Any, context: np.ndarray, response: np.ndarray, share: float) -> Tensor:
        if response.size == 0:
            return torch.zeros((), dtype=torch.float64)
        ids = torch.tensor(np.concatenate([context, response]))[None]
        logits = model(ids).logits[0]
        if share:
            logits = (1 - share) * logits + share * self.reference(ids).logits[0]
        logprobs = torch.log_softmax(logits[:-1], -1).gather(-1, ids[0, 1:, None])[:, 0]
        total: Tensor = logprobs[max(len(context) - 1, 0) :].sum()
        return total


def _as_stored(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model by the names of its checkpoints, which hold experts apart that transformers computes as one tensor."""
    if not any(".experts." in name for name in tensors):
        return tensors
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict=tensors)
        return {name: tensor for path in Path(folder).glob("*.safetensors") for name, tensor in load_file(path).items()}


def dense_model(hf_dir: Path) -> Any:
    """A Hugging Face model in float64."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        hf_dir, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
