"""Log-probs of responses under any attached model, outside of training.

Every function here is collective: all ranks of the run call it together, with the same pairs.

Shape letter: P pairs.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_rmipo.data.batches.batch_builder import BatchBuilder
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.fitting import check_pairs_fit
from megatron_rmipo.data.batches.sizes import BY_TOKENS
from megatron_rmipo.data.store.collection import PairCollection, PairData, open_pairs
from megatron_rmipo.data.store.reference_scores import Scores
from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.model.packed_model import Chunks, chunks_of, unwrapped
from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.objectives.contract import check_objective
from megatron_rmipo.passes.row_problems import check_rows
from megatron_rmipo.passes.rows import scores_everywhere
from megatron_rmipo.plugin.context import ContextTokenId, context_token
from megatron_rmipo.plugin.without_adapters import adapters_off, has_adapters
from megatron_rmipo.runtime.evaluation_mode import evaluating
from megatron_rmipo.runtime.groups import ProcessGroups

# Pairs of each data-parallel rank that are laid out at a time: enough to fill several packs.
_PAIRS_AT_A_TIME = 64


@dataclasses.dataclass(frozen=True)
class PairScores:
    """Log-probs of (chosen, rejected) of each pair, in their order, the same on every rank.

    Attributes:
        logps: fp32 ``[P, 2]``, sums over the tokens of a response given its prompt; 0 for one that is not there.
        lengths: int64 ``[P, 2]``, how many tokens that were.
        unconditional_logps, unconditional_lengths: the same without the prompt; None where not asked for.
    """

    logps: Scores
    lengths: npt.NDArray[np.int64]
    unconditional_logps: Scores | None = None
    unconditional_lengths: npt.NDArray[np.int64] | None = None


def score(
    model: Chunks,
    rows: PairData,
    *,
    tokens_per_microbatch: int,
    unconditional: bool = False,
    context_token_id: ContextTokenId = "bos",
    share_prompts: bool = True,
    multiple_of: int | None = None,
    groups: ProcessGroups | None = None,
) -> PairScores:
    """Log-probs of the responses of pairs under a model as it is now, in evaluation mode. The model is left as it was.

    Args:
        model: attached, this rank's part, wrapped or not; of an interleaved pipeline the list of its chunks.
        rows: ``PREFIX`` of prepared data, several, a collection, or ``(prompt_ids, chosen_ids, rejected_ids)`` of each pair.
        tokens_per_microbatch: most tokens that run through the model at a time; twice as many of responses alone.
        unconditional: also score the responses without their prompts.
        context_token_id: as of :func:`megatron_rmipo.plugin.batches.preference_batches`.
        share_prompts: a prompt stands once for both responses.
        multiple_of: rows are padded to a multiple of this many tokens; None: TP under sequence parallelism, else 1.
        groups: the process groups of this rank; None: Megatron's.

    Raises:
        ConfigError: the model is not attached; a pair fits no micro-batch, is too long for the model or has tokens that are none
            of its vocabulary.
        DataError: a data set is missing or incomplete.
    """
    groups = groups or ProcessGroups.of_megatron()
    pairs = open_pairs(rows)
    context = context_token(context_token_id, pairs) if unconditional else None
    layout = BatchLayout(
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        tokens_per_microbatch=tokens_per_microbatch,
        cost=BY_TOKENS,
        share_prompts=share_prompts,
        unconditional="bos" if unconditional else None,
        bos_token_id=context,
        multiple_of=_row_multiple(model, groups) if multiple_of is None else multiple_of,
        equal_packs=groups.ep.size() > 1,
    )
    # Without what else the collection has: nothing but the pairs is scored.
    alone = PairCollection(pairs.stores, pairs.spans)
    check_pairs_fit(alone, layout, name="tokens_per_microbatch")
    return _score(model, BatchBuilder(alone, layout), groups)


@torch.no_grad()
def _score(model: Chunks, builder: BatchBuilder, groups: ProcessGroups) -> PairScores:
    num_pairs, size = len(builder.pairs), _PAIRS_AT_A_TIME * groups.dp_size
    conditional, alone = [], []
    with evaluating(model):
        for first in range(0, num_pairs, size):
            batch = builder.build(np.arange(first, min(first + size, num_pairs)))
            check_rows(model, batch.rows, batch.lengths)
            conditional.append(scores_everywhere(model, batch.conditional, batch.num_pairs, groups).numpy())
            if batch.unconditional:
                name = "unconditional scoring pass"
                alone.append(scores_everywhere(model, batch.unconditional, batch.num_pairs, groups, name=name).numpy())
    sums, lengths = _sums_and_lengths(conditional)
    return PairScores(sums, lengths, *(_sums_and_lengths(alone) if alone else (None, None)))


def _sums_and_lengths(blocks: list[npt.NDArray[np.float32]]) -> tuple[Scores, npt.NDArray[np.int64]]:
    table = np.concatenate(blocks)
    return table[:, :, 0], table[:, :, 1].astype(np.int64)


def _row_multiple(model: Chunks, groups: ProcessGroups) -> int:
    return groups.tp_size if unwrapped(chunks_of(model)[0]).config.sequence_parallel else 1


def score_reference(
    model: Chunks,
    pairs: PairCollection,
    objective: Objective,
    *,
    tokens_per_microbatch: int,
    share_prompts: bool = True,
    multiple_of: int | None = None,
    groups: ProcessGroups | None = None,
) -> None:
    """Give pairs what an objective reads of its reference: the log-probs of the model as it is now. Before training, then.

    Of a model that has adapters it is the model with them off, whether they are trained already or not.

    Afterwards :func:`megatron_rmipo.plugin.batches.preference_batches` takes the pairs for the objective.

    Args:
        model, tokens_per_microbatch, share_prompts, multiple_of, groups: as of :func:`score`.
        pairs: of :func:`megatron_rmipo.data.store.collection.open_pairs`; they get ``reference_scores``, and where the objective
            reads them mismatched pairs with theirs.
        objective: what is going to be trained.

    Raises:
        ConfigError: as there; the objective reads none, ``pairs`` is nothing that could keep them, or the model is trained
            beside adapters of Megatron-Bridge.
        DataError: a log-prob is not finite, or all prompts of a data set are the same.
    """
    check_objective(objective)
    if not isinstance(pairs, PairCollection):
        raise ConfigError(
            f"score_reference leaves the log-probs with the pairs, and {pairs!r:.80} cannot keep them. Give it and "
            "preference_batches the same pairs = megatron_rmipo.plugin.open_pairs(...)."
        )
    needs = objective.needs
    if not (needs.reference or needs.mismatched):
        keeps = "keeps its reference in memory: PreferenceStep(objective, reference=model) takes one"
        raise ConfigError(
            f"objective {objective.name} reads no log-probs of a reference kept beside the data; it "
            f"{'compares with none' if needs.perturbation is None else keeps}. Leave the call out."
        )
    if needs.mismatched and pairs.mismatched is None:
        pairs.match_anew()
    options = {
        "tokens_per_microbatch": tokens_per_microbatch,
        "share_prompts": share_prompts,
        "multiple_of": multiple_of,
        "groups": groups,
    }
    with adapters_off(model) if has_adapters(model) else contextlib.nullcontext():
        for _, part in pairs.read_under_reference(matched=needs.reference):
            once = part.distinct()
            part.reference_scores = _by_store(once, reference_logps(model, once, **options))


def reference_logps(model: Chunks, pairs: PairCollection, **options: Any) -> Scores:
    """fp32 ``[P, 2]``: log-probs of (chosen, rejected) under the model as it is now, on every rank.

    Args:
        model, pairs, options: as of :func:`score`.

    Raises:
        ConfigError: as there.
        DataError: one is not finite.
    """
    found = score(model, pairs, **options).logps
    broken = np.flatnonzero(~np.isfinite(found).all(axis=1))
    if broken.size:
        raise DataError(f"{pairs.describe(int(broken[0]))} has the log-probs {found[broken[0]].tolist()} under the reference.")
    return found


def _by_store(pairs: PairCollection, scores: Scores) -> list[Scores]:
    """Scores of pairs at their places in the data sets, NaN for pairs that are none of the collection."""
    sizes = [len(store) for store in pairs.stores]
    table = np.full((sum(sizes), 2), np.nan, dtype=np.float32)
    table[pairs.members_of(np.arange(len(pairs)))] = scores
    return np.split(table, np.cumsum(sizes)[:-1])
