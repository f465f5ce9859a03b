"""Prepared data for the training tests: the pairs of the parity fixture, whose model and tokenizer are at hand."""

from __future__ import annotations

from pathlib import Path

from megatron_rmipo.data.manifest import Manifest
from megatron_rmipo.data.pair_store import PairStoreWriter, TokenizedPair
from megatron_rmipo.data.tokenize import load_tokenizer
from tests.parity.replay import read_pairs

FIXTURE = Path(__file__).parents[1] / "parity" / "fixtures" / "rmipo"
MODEL = FIXTURE / "model"


def write_pairs(prefix: Path, pairs: list[TokenizedPair] | None = None, *, tokenizer_dir: Path = MODEL) -> Path:
    """Prepare pairs (by default the fixture's 48) under ``prefix`` as the data tool would."""
    with PairStoreWriter(prefix, vocab_size=400) as writer:
        for pair in pairs if pairs is not None else read_pairs(FIXTURE):
            writer.add(pair)
        writer.finalize(Manifest(tokenizer=load_tokenizer(str(tokenizer_dir)).info))
    return prefix
