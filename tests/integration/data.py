"""Prepared data for the training tests: the pairs of the parity fixture, whose model and tokenizer are at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rmipo.data.encoding.tokenize import load_tokenizer
from megatron_rmipo.data.store.chat_form import ChatForm
from megatron_rmipo.data.store.manifest import Manifest
from megatron_rmipo.data.store.pair_store import PairStoreWriter, TokenizedPair
from tests.parity.replay import read_pairs

FIXTURE = Path(__file__).parents[1] / "parity" / "fixtures" / "rmipo"
MODEL = FIXTURE / "model"
# Not the template of the model's tokenizer.
CHAT = ChatForm("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}", None, 2)
NONE: Mapping[str, Sequence[float]] = {}


def write_unpaired(prefix: Path) -> Path:
    """The same as unpaired rows: every chosen response, and of two pairs in three the rejected one, in rows of their own."""
    with PairStoreWriter(prefix, vocab_size=400, unpaired=True) as writer:
        for number, pair in enumerate(read_pairs(FIXTURE)):
            writer.add(TokenizedPair(pair.prompt, pair.chosen, pair.rejected[:0]))
            if number % 3:
                writer.add(TokenizedPair(pair.prompt, pair.chosen[:0], pair.rejected))
        writer.finalize(Manifest(tokenizer=load_tokenizer(str(MODEL)).info))
    return prefix


def write_pairs(
    prefix: Path,
    *,
    with_rejected: bool = True,
    swap_first: bool = False,
    first: int = 0,
    values: Mapping[str, Sequence[float]] = NONE,
) -> Path:
    """Prepare the fixture's 48 pairs under ``prefix`` as the data tool would.

    Args:
        prefix: what stands there is replaced.
        with_rejected: False leaves the rejected responses out.
        swap_first: exchange the responses of the first pair.
        first: leave out the pairs before this one.
        values: column -> a number beside each pair.
    """
    with PairStoreWriter(prefix, vocab_size=400, columns=list(values), overwrite=True) as writer:
        for number, pair in enumerate(read_pairs(FIXTURE)[first:]):
            chosen, rejected = (pair.rejected, pair.chosen) if swap_first and number == 0 else (pair.chosen, pair.rejected)
            beside = [column[number] for column in values.values()]
            writer.add(TokenizedPair(pair.prompt, chosen, rejected if with_rejected else rejected[:0]), beside)
        writer.finalize(
            Manifest(tokenizer=load_tokenizer(str(MODEL)).info, has_rejected=with_rejected, template_name="own.jinja", chat=CHAT)
        )
    return prefix
