"""Prepared pairs in Megatron-LM's loop: what its arguments name, and log-probs of the reference."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.nn import Module

from megatron_rmipo.config.flags.data import parse_blend
from megatron_rmipo.data.encoding.context_token import find_context_token
from megatron_rmipo.data.encoding.tokenize import load_tokenizer
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.data.store.reference_scores import Kind, Scores, data_fingerprint
from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.objectives.base import LogpNeeds
from megatron_rmipo.passes.needed_data import check_length, check_needed
from megatron_rmipo.plugin.scores import reference_logps
from megatron_rmipo.runtime.agreement import on_every_rank, on_first_rank
from megatron_rmipo.runtime.groups import ProcessGroups


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
    objective = f"--objective {args.objective}"
    check_needed(stores, flag, needs, objective, lambda column: f"{objective} or --pair-weight")
    for store in stores:
        check_length(store, args.seq_length)
        _check_vocabulary(store, flag, args, vocab_size)
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
    bos_token_id: int | None = manifests[0].tokenizer.bos_token_id
    return bos_token_id


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
        for kind, pairs in part.read_under_reference(matched=needs.reference):
            for store in pairs.stores:
                if (kind, store.prefix) not in tables:
                    tables[kind, store.prefix] = _scores_of(model, kind, store, args, groups)
            pairs.reference_scores = [tables[kind, store.prefix] for store in pairs.stores]


def _scores_of(model: Module, kind: Kind, store: Any, args: Any, groups: ProcessGroups) -> Scores:
    fingerprint = on_first_rank(groups.world, partial(data_fingerprint, store.prefix))
    name = f"reference/{kind}-{fingerprint[:16]}.npy"
    if args.iteration > 0:
        path = on_first_rank(groups.world, partial(_find_scores, name, store, args))
        return on_every_rank(groups.world, partial(_map_scores, path))
    scores = reference_logps(
        model,
        PairCollection([store]),
        tokens_per_microbatch=2 * args.seq_length * args.micro_batch_size,
        share_prompts=args.share_prompts,
        groups=groups,
    )
    if args.save:
        on_first_rank(groups.world, partial(_write_scores, Path(args.save) / name, scores))
    return scores


def _find_scores(name: str, store: Any, args: Any) -> Path:
    for folder in (args.save, args.load):
        if folder and (path := Path(folder) / name).exists() and _map_scores(path).shape == (len(store), 2):
            return path
    raise ConfigError(
        f"--load {args.load}: the run goes on, but the log-probs of {store.prefix} under the model that it began with are not in "
        f"{name} of --save or --load. Take the directory that the run was begun with, or begin anew with --finetune."
    )


def _map_scores(path: Path) -> Scores:
    """As a plain array over the file, whose pages processes share: each slice of a memmap costs as much as the work on it."""
    try:
        return np.asarray(np.load(path, mmap_mode="r"))
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path}: not readable as an array ({error}). Take the directory that the run was begun with, on a disk "
            "that all nodes share, or begin anew with --finetune."
        ) from None


def _write_scores(path: Path, scores: Scores) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f".{path.name}")
    np.save(partial_path, scores)
    os.replace(partial_path, path)
