"""Prepared data for the training tests: the pairs of the parity fixture, whose model and tokenizer are at hand."""

from __future__ import annotations

from pathlib import Path

from megatron_rmipo.data.manifest import Manifest
from megatron_rmipo.data.pair_store import PairStoreWriter, TokenizedPair
from megatron_rmipo.data.tokenize import load_tokenizer
from tests.parity.replay import read_pairs

FIXTURE = Path(__file__).parents[1] / "parity" / "fixtures" / "rmipo"
MODEL = FIXTURE / "model"


def write_pairs(prefix: Path, *, with_rejected: bool = True) -> Path:
    """Prepare the fixture's 48 pairs under ``prefix`` as the data tool would, or their chosen responses alone."""
    with PairStoreWriter(prefix, vocab_size=400) as writer:
        for pair in read_pairs(FIXTURE):
            rejected = pair.rejected if with_rejected else pair.rejected[:0]
            writer.add(TokenizedPair(pair.prompt, pair.chosen, rejected))
        writer.finalize(Manifest(tokenizer=load_tokenizer(str(MODEL)).info, has_rejected=with_rejected))
    return prefix
