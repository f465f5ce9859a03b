"""Prepared pairs in Megatron-LM's loop: what its arguments name, held-out pairs again and again, log-probs of the reference.

Shape letter: P rows of a data set.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import Module

from megatron_rmipo.config.data_flags import parse_blend
from megatron_rmipo.data.batches.loader import BatchBuilder, BatchLayout
from megatron_rmipo.data.batches.sizes import CostModel
from megatron_rmipo.data.encoding.context_token import find_context_token
from megatron_rmipo.data.encoding.tokenize import load_tokenizer
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.data.store.reference_scores import Kind, Scores, data_fingerprint
from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.objectives.base import LogpNeeds
from megatron_rmipo.passes.needed_data import check_length, check_read, refuse_empty, refuse_mixed
from megatron_rmipo.passes.rows import from_last_stage, gather_pairs, score_responses
from megatron_rmipo.plugin.batches import Microbatch, PreferenceBatches
from megatron_rmipo.runtime.agreement import on_first_rank
from megatron_rmipo.runtime.groups import ProcessGroups

# Pairs of each data-parallel rank that are scored at a time.
_PAIRS_AT_A_TIME = 64


def open_named_pairs(args: Any, flag: str, values: Sequence[str], needs: LogpNeeds, vocab_size: int) -> PairCollection:
    """What ``--train-data-path`` or ``--valid-data-path`` names.

    Args:
        args: Megatron-LM's.
        flag: the one that does.
        values: one PREFIX, or weights and prefixes in turn.
        needs: of the objective; where it reads mismatched pairs, they are made.
        vocab_size: real vocabulary of the model.

    Raises:
        ConfigError: a pair is too long, or the blend is not written as one.
        DataError: a data set is missing, incomplete or empty, was made with another tokenizer, or has not what is needed.
    """
    blend = parse_blend(values, flag)
    stores = [PairStore(prefix) for _, prefix in blend]
    for store in stores:
        refuse_empty(store, flag)
        check_read(store, flag, needs, args.objective, lambda column: f"--objective {args.objective} or --pair-weight")
        check_length(store, args.seq_length)
        _check_vocabulary(store, flag, args, vocab_size)
    refuse_mixed(stores)
    weights = [weight for weight, _ in blend] if len(blend) > 1 else None
    pairs = PairCollection.combine([PairCollection([store]) for store in stores], weights)
    if needs.mismatched:
        pairs.match_anew()
    return pairs


def _check_vocabulary(store: PairStore, flag: str, args: Any, vocab_size: int) -> None:
    made_with = store.manifest.tokenizer
    remedy = "Prepare the data with the tokenizer of the model."
    if made_with.vocab_size > vocab_size:
        raise DataError(
            f"{flag} {store.prefix}: token ids up to {made_with.vocab_size - 1}, but the model's vocabulary has {vocab_size} "
            f"(--vocab-size, or that of the tokenizer). {remedy}"
        )
    if args.tokenizer_type == "HuggingFaceTokenizer":
        found = load_tokenizer(args.tokenizer_model).info.fingerprint
        if found != made_with.fingerprint:
            raise DataError(
                f"{flag} {store.prefix}: made with another tokenizer ({made_with.fingerprint[:12]}) than --tokenizer-model "
                f"{args.tokenizer_model} ({found[:12]}). {remedy}"
            )


def context_token_of(args: Any, collections: Sequence[PairCollection]) -> int | None:
    """The token before a response in log p(y), as the trainer chooses it; without a Hugging Face tokenizer BOS alone."""
    manifests = [store.manifest for pairs in collections for store in pairs.stores]
    if args.tokenizer_type == "HuggingFaceTokenizer":
        return find_context_token(load_tokenizer(args.tokenizer_model), manifests).token_id
    return manifests[0].tokenizer.bos_token_id


class HeldOutBatches(Iterator[Microbatch]):
    """The same held-out pairs at every evaluation, as an iterator without an end.

    Args:
        begin: an evaluation's micro-batches.
    """

    def __init__(self, begin: Callable[[], PreferenceBatches]) -> None:
        self._begin, self._current = begin, begin()

    def __next__(self) -> Microbatch:
        try:
            return next(self._current)
        except StopIteration:
            self._current = self._begin()
            return next(self._current)


def held_out_pairs(args: Any, pairs: PairCollection) -> int:
    """Pairs of an evaluation.

    Raises:
        ConfigError: there are fewer than ``--eval-iters`` asks for.
    """
    size = args.eval_global_batch_size
    wanted: int = args.eval_iters * size
    if wanted > len(pairs):
        raise ConfigError(
            f"--eval-iters {args.eval_iters} x {size} pairs: --valid-data-path {' '.join(args.valid_data_path)} has "
            f"{len(pairs)}. Give --eval-iters {len(pairs) // size}, or a smaller --eval-global-batch-size."
        )
    return wanted


def attach_reference_scores(
    model: Module, collections: Sequence[PairCollection], needs: LogpNeeds, args: Any, groups: ProcessGroups
) -> None:
    """Give the pairs the reference's log-probs, the reference being the model that the run starts from. All ranks call it.

    They are computed at the start and kept under ``--save``; a run that goes on reads them there, or under ``--load``.

    Args:
        model: attached, as the run starts, or goes on, with it.
        collections: get the scores; their mismatched pairs are made before.
        needs: of the objective.
        args: Megatron-LM's.
        groups: the process groups of this rank.

    Raises:
        ConfigError: the run goes on, and they are not there.
        DataError: a log-prob is not finite.
    """
    tables: dict[tuple[Kind, str], Scores] = {}
    for part in collections:
        wanted: list[tuple[Kind, PairCollection]] = [("matched", part)] if needs.reference else []
        if part.mismatched is not None:
            wanted.append(("mismatched", part.mismatched))
        for kind, pairs in wanted:
            for store in pairs.stores:
                if (kind, store.prefix) not in tables:
                    tables[kind, store.prefix] = _scores_of(model, kind, store, args, groups)
            pairs.reference_scores = [tables[kind, store.prefix] for store in pairs.stores]


def _scores_of(model: Module, kind: Kind, store: Any, args: Any, groups: ProcessGroups) -> Scores:
    fingerprint = on_first_rank(groups.world, partial(data_fingerprint, store.prefix))
    name = f"reference/{kind}-{fingerprint[:16]}.npy"
    if args.iteration > 0:
        return on_first_rank(groups.world, partial(_read_scores, name, store, args))
    scores = _score(model, PairCollection([store]), args, groups)
    if not np.isfinite(scores).all():
        row = int(np.flatnonzero(~np.isfinite(scores).all(axis=1))[0])
        raise DataError(f"pair {row} of {store.prefix}: its log-prob under the model of the start is not finite.")
    if args.save:
        on_first_rank(groups.world, partial(_write_scores, Path(args.save) / name, scores))
    return scores


def _read_scores(name: str, store: Any, args: Any) -> Scores:
    for folder in (args.save, args.load):
        if folder and (path := Path(folder) / name).exists():
            scores: Scores = np.load(path)
            if scores.shape == (len(store), 2):
                return scores
    raise ConfigError(
        f"--load {args.load}: the run goes on, but the log-probs of {store.prefix} under the model that it began with are not in "
        f"{name} of --save or --load. Take the directory that the run was begun with, or begin anew with --finetune."
    )


def _write_scores(path: Path, scores: Scores) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f".{path.name}")
    np.save(partial_path, scores)
    os.replace(partial_path, path)


@torch.no_grad()
def _score(model: Module, pairs: PairCollection, args: Any, groups: ProcessGroups) -> Scores:
    """fp32 ``[P, 2]``: sums of log-probs of (chosen, rejected), on every rank."""
    layout = BatchLayout(
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        tokens_per_microbatch=2 * args.seq_length * args.micro_batch_size,
        cost=CostModel(per_token=1.0, per_area=0.0, per_scored_token=0.0),
        share_prompts=args.share_prompts,
        multiple_of=args.tensor_model_parallel_size if args.sequence_parallel else 1,
        equal_packs=groups.ep.size() > 1,
    )
    builder, found = BatchBuilder(pairs, layout), []
    trains = model.training
    model.eval()
    for first in range(0, len(pairs), _PAIRS_AT_A_TIME * groups.dp_size):
        batch = builder.build(np.arange(first, min(first + _PAIRS_AT_A_TIME * groups.dp_size, len(pairs))))
        scores = score_responses(model, batch.conditional, batch.num_pairs, name="reference pass")
        if groups.is_last_stage:
            scores = gather_pairs(scores, groups)
        found.append(from_last_stage(scores, groups)[:, :, 0].numpy())
    model.train(trains)
    return np.concatenate(found)
