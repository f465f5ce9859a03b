"""Pairs and weights that both sides of a benchmark read."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.store.pair_store import PairStore, TokenizedPair
from megatron_rmipo.families.architecture import ModelArchitecture, Rope

LLAMA_3_8B = ModelArchitecture(
    family="llama",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128256,
    max_position_embeddings=8192,
    ropes=(Rope(500000.0),),
    layernorm_epsilon=1e-5,
)
LLAMA_3_70B = dataclasses.replace(LLAMA_3_8B, num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64)
BOS, EOS = 1, 2
# Token lengths that come with this repository; see README.md.
RECORDED = {name: Path(__file__).parent / "lengths" / f"{name}.csv" for name in ("ultrafeedback", "hh")}


class Pairs(Sequence[TokenizedPair]):
    """Pairs in memory, with the lengths a batch is cut by."""

    def __init__(self, pairs: Sequence[TokenizedPair]) -> None:
        self._pairs = list(pairs)
        self.lengths = np.array([[len(pair.prompt), len(pair.chosen), len(pair.rejected)] for pair in pairs], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._pairs)

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """int32 ``[rows, 3]``."""
        return self.lengths[rows]

    def __getitem__(self, index: Any) -> Any:
        return self._pairs[index]


class Lengths:
    """In the place of a data set, where no token is read.

    Args:
        lengths: int ``[P, 3]``.
    """

    prefix = "lengths"

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Int ``[rows, 3]``."""
        return self.lengths[rows]


def read_lengths(source: str) -> np.ndarray:
    """Prompt, chosen and rejected tokens of pairs, int64 ``[P, 3]``.

    Args:
        source: a name of :data:`RECORDED`, or a file of JSON lines with ``prompt_len``, ``chosen_len`` and ``rejected_len``.
    """
    if source in RECORDED:
        return np.loadtxt(RECORDED[source], dtype=np.int64, delimiter=",", skiprows=1, ndmin=2)
    rows = [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines()]
    return np.array([[row["prompt_len"], row["chosen_len"], row["rejected_len"]] for row in rows], dtype=np.int64)


def cut_lengths(lengths: np.ndarray, seq_length: int) -> np.ndarray:
    """Lengths, int64 ``[P, 3]``, such that a prompt and its longer response fit: no response over half, the prompt the rest."""
    responses = np.minimum(lengths[:, 1:], seq_length // 2)
    prompts = np.minimum(lengths[:, 0], seq_length - responses.max(axis=1))
    return np.column_stack([prompts, responses])


def step_costs(lengths: np.ndarray, layout: BatchLayout) -> np.ndarray:
    """What each pair of ``[P, 3]`` lengths costs in a step, as the trainer's batches count it, float64 ``[P]``."""
    beside = [layout.unconditional_sizes(lengths)] if layout.unconditional else []
    return layout.step_costs(layout.conditional_sizes(lengths), *beside)


def read_pairs(options: argparse.Namespace) -> Pairs:
    """The first ``--num-pairs`` pairs: prepared ones, or random tokens of given or drawn lengths."""
    if options.data_path is not None:
        store = PairStore(options.data_path)
        return Pairs([store[index] for index in range(min(options.num_pairs, len(store)))])
    rng = np.random.default_rng(options.seed)
    if options.lengths is not None:
        lengths = read_lengths(options.lengths)[: options.num_pairs]
    else:
        # Skewed like chat data: medians of 120 and 160 tokens, some several times longer.
        lengths = rng.lognormal(np.log([120.0, 160.0, 160.0]), [0.9, 0.7, 0.7], size=(options.num_pairs, 3)).astype(np.int64)
    lengths = np.maximum(1, np.floor(lengths / options.shrink)).astype(np.int64)
    lengths = cut_lengths(lengths, options.seq_length)
    return random_pairs(lengths, options.vocab_size, rng)


def random_pairs(lengths: np.ndarray, vocab_size: int, rng: np.random.Generator) -> Pairs:
    """Pairs of random tokens, of ``[P, 3]`` lengths; BOS before a prompt, EOS at the end of a response."""
    pairs = []
    for prompt, chosen, rejected in lengths:
        tokens = [rng.integers(3, vocab_size, size=size) for size in (prompt, chosen, rejected)]
        tokens[0][0] = BOS
        tokens[1][-1] = tokens[2][-1] = EOS
        pairs.append(TokenizedPair(*tokens))
    return Pairs(pairs)


def save_random_model(options: argparse.Namespace, directory: Path) -> None:
    """A Llama of the given size with random weights, which both sides read."""
    config = transformers.LlamaConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=options.ffn_hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_attention_heads,
        num_key_value_heads=options.num_query_groups,
        max_position_embeddings=max(2048, options.seq_length),
        tie_word_embeddings=False,
        dtype="float32",
    )
    torch.manual_seed(options.seed)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
