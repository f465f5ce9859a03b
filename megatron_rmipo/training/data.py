"""The prepared data of a run, whether it fits the model, and whether outputs would overwrite anything."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from megatron_rmipo.checkpoint.hf.assets import check_output_directory
from megatron_rmipo.checkpoint.source import ModelSource, holds_checkpoints
from megatron_rmipo.config.schema import Config, ModelConfig
from megatron_rmipo.data.batches.loader import BatchLayout
from megatron_rmipo.data.encoding.tokenize import load_tokenizer
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.mismatch import MismatchedStore
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.model.attention.packed import BACKENDS, choose_backend
from megatron_rmipo.model.flops import forward_cost_model
from megatron_rmipo.model.transformer_engine import fp8_multiple
from megatron_rmipo.objectives.base import LogpNeeds
from megatron_rmipo.training.validation import parse_blend, parse_split


def check_outputs(config: Config) -> None:
    """Refuse output directories in which something would be lost.

    Raises:
        ConfigError: ``--save`` is a file, or holds checkpoints of a run that this one does not go on with.
        ConversionError: ``--save-hf`` holds something.
    """
    if config.checkpoint.save_hf is not None:
        check_output_directory(Path(config.checkpoint.save_hf), "--save-hf")
    if config.checkpoint.save is None:
        return
    save = Path(config.checkpoint.save)
    if save.exists() and not save.is_dir():
        raise ConfigError(f"--save {save} is a file. Name a directory.")
    goes_on = config.checkpoint.load is not None and Path(config.checkpoint.load).resolve() == save.resolve()
    if holds_checkpoints(save) and not (goes_on and not config.checkpoint.finetune):
        raise ConfigError(
            f"--save {save} holds checkpoints of another run. Go on with that run with --load {save} (without --finetune), or "
            "name another directory."
        )


@dataclasses.dataclass(frozen=True)
class RunData:
    """Prepared pairs of a run.

    Attributes:
        train: pairs to train on.
        held_out: pairs to evaluate on, or None.
        num_held_out: how many of them.
        bos_token_id: of the tokenizer they were made with, or None.
    """

    train: PairCollection
    held_out: PairCollection | None
    num_held_out: int
    bos_token_id: int | None


def open_data(config: Config, source: ModelSource, needs: LogpNeeds) -> RunData:
    """Open ``--data-path`` and the held-out pairs, and check that they fit the model.

    Args:
        config: the run's configuration.
        source: the model.
        needs: of the objective; where it reads mismatched pairs, they are made.

    Raises:
        ConfigError: no data is named, or a flag asks for more than there is.
        DataError: a data set is missing, incomplete, empty, made with another tokenizer, or without the responses that the
            objective needs; or unpaired data is blended with pairs.
    """
    if not config.data.data_path:
        raise ConfigError("no data to train on: give --data-path PREFIX (of PREFIX.bin, .idx and .json).")
    tokenizer = load_tokenizer(str(source.assets)).info
    check = partial(_check_store, fingerprint=tokenizer.fingerprint, needs=needs, config=config, source=source)
    parts, weights = _open_blend(config.data.data_path, "--data-path", check)
    held_out = None
    if config.data.valid_data_path:
        held_out = PairCollection.combine(*_open_blend(config.data.valid_data_path, "--valid-data-path", check))
    elif config.data.split:
        # Each data set is split before it is blended: repeating one must not bring its held-out pairs into training.
        share = parse_split(config.data.split)[1]
        split_parts = [part.split(share) for part in parts]
        for (first, _), part in zip(split_parts, parts, strict=True):
            if len(first) == 0:
                raise DataError(
                    f"--split {config.data.split} leaves nothing to train on of the {len(part)} pairs of "
                    f"{part.stores[0].prefix}. Hold out less, or name held-out data with --valid-data-path."
                )
        parts = [first for first, _ in split_parts]
        held_out = PairCollection.combine([last for _, last in split_parts])
    train = PairCollection.combine(parts, weights)
    collections = [pairs for pairs in (train, held_out) if pairs is not None]
    _refuse_mixed([store for pairs in collections for store in pairs.stores])
    made: dict[str, MismatchedStore] = {}
    for pairs in collections if needs.mismatched else []:
        pairs.match_anew(made)
    num_held_out = min(len(held_out), config.training.eval_pairs or len(held_out)) if held_out is not None else 0
    return RunData(train, held_out, num_held_out, tokenizer.bos_token_id)


def _open_blend(
    values: Sequence[str], flag: str, check: Callable[[PairStore, str], None]
) -> tuple[list[PairCollection], list[float] | None]:
    """The data sets a flag names, each checked, and their weights; None where there is one alone."""
    blend = parse_blend(values, flag)
    stores = [PairStore(prefix) for _, prefix in blend]
    for store in stores:
        check(store, flag)
    return [PairCollection([store]) for store in stores], [weight for weight, _ in blend] if len(blend) > 1 else None


def check_tokenizer(store: PairStore, flag: str, source: ModelSource, fingerprint: str) -> None:
    """Refuse data that was made with another tokenizer than the model's, whose fingerprint is given.

    Raises:
        DataError: naming both.
    """
    made_with = store.manifest.tokenizer
    if made_with.fingerprint != fingerprint:
        raise DataError(
            f"{flag} {store.prefix}: made with another tokenizer (vocabulary of {made_with.vocab_size}, "
            f"{made_with.fingerprint[:12]}) than the model's in {source.assets} ({fingerprint[:12]}). Prepare it again: "
            f"tools/preprocess_preferences.py --tokenizer-model {source.assets}."
        )
    if made_with.vocab_size > source.arch.vocab_size:
        raise DataError(
            f"{flag} {store.prefix}: its tokenizer knows ids up to {made_with.vocab_size - 1}, but the model in {source.assets} "
            f"has vocab_size {source.arch.vocab_size}. Use the tokenizer the model was trained with."
        )


def _refuse_mixed(stores: Sequence[PairStore]) -> None:
    """Unpaired rows count one response, pairs two: a mean over rows of both kinds would weigh responses unevenly."""
    kinds = {store.manifest.unpaired: store.prefix for store in stores}
    if len(kinds) > 1:
        raise DataError(
            f"{kinds[True]} holds unpaired rows, {kinds[False]} pairs; one run takes one kind. Train on them one after the "
            "other, or write the pairs as unpaired rows, too."
        )


def _check_store(store: PairStore, flag: str, *, fingerprint: str, needs: LogpNeeds, config: Config, source: ModelSource) -> None:
    if len(store) == 0:
        raise DataError(f"{flag} {store.prefix}: no pairs in it. Look at {store.prefix}.json for why rows were dropped.")
    check_tokenizer(store, flag, source, fingerprint)
    objective = config.objective.objective
    if needs.rejected and not store.manifest.has_rejected:
        raise DataError(
            f"{flag} {store.prefix}: supervised data, without rejected responses, which --objective {objective} needs. "
            "Train on preference pairs, or use --objective sft."
        )
    if store.manifest.unpaired and not needs.unpaired:
        raise DataError(
            f"{flag} {store.prefix}: unpaired data, one response with a label a row, but --objective {objective} needs "
            f"{'preference pairs' if needs.rejected else 'supervised rows or preference pairs'}. Prepare such data, or use "
            "--objective kto."
        )
    longest = store.lengths[:, 0] + store.lengths[:, 1:].max(axis=1)
    most, allowed = int(longest.max()), config.data.seq_length
    if most > allowed:
        raise ConfigError(
            f"--seq-length {allowed}: pair {int(longest.argmax())} of {store.prefix} is {most} tokens long. "
            f"Use --seq-length {most}, or prepare the data again with --seq-length {allowed}."
        )


def conditional_layout(config: Config, arch: ModelArchitecture, *, dp_rank: int, dp_size: int) -> BatchLayout:
    """How a run cuts pairs and lays them out, prompt with both responses, on one data-parallel rank."""
    parallel = config.parallel
    return BatchLayout(
        dp_rank=dp_rank,
        dp_size=dp_size,
        tokens_per_microbatch=config.data.tokens_per_microbatch,
        cost=forward_cost_model(arch),
        share_prompts=config.model.share_prompts,
        multiple_of=_row_multiple(config.model, shards=parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1),
    )


def _row_multiple(model: ModelConfig, *, shards: int) -> int:
    """What number of tokens a row is padded to a multiple of, where each of ``shards`` ranks holds an equal part of it."""
    return math.lcm(BACKENDS[choose_backend(model.attention_backend)], fp8_multiple(model) * shards)
