"""Command line of ``tools/score_pairs.py``: log-probs of prepared data under any checkpoint, kept beside the data.

Training with an objective that needs a reference finds them there; whoever else wants them maps ``scores.npy`` into memory.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import traceback
from collections.abc import Sequence

from megatron_rmipo.checkpoint.agreement import on_first_rank
from megatron_rmipo.config import CheckpointConfig, Config, DataConfig, LoggingConfig, ModelConfig, ParallelConfig
from megatron_rmipo.config_parsing import parse_fields
from megatron_rmipo.data.batching import check_capacity
from megatron_rmipo.data.mismatch import MismatchedStore
from megatron_rmipo.data.pair_store import PairStore
from megatron_rmipo.data.tokenize import load_tokenizer
from megatron_rmipo.errors import ConfigError, DataError, RmipoError
from megatron_rmipo.runtime.environment import check_environment
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime
from megatron_rmipo.training.inputs import conditional_layout
from megatron_rmipo.training.model_source import ModelSource, find_model, load_weights, weights_fingerprint
from megatron_rmipo.training.scoring import Kind, score_keys, score_store
from megatron_rmipo.training.setup import build_model
from megatron_rmipo.training.validation import refuse_impossible_layout

_DESCRIPTION = (
    "Compute the log-probs of prepared data under a checkpoint, at any parallel layout, and keep them beside the data as a "
    "memory-mapped array. Goes on where it was stopped. Start several ranks with torchrun."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """What to score."""

    pairs: list[str] = dataclasses.field(
        default_factory=list,
        metadata={"help": "Prepared data, one or more: PREFIX of PREFIX.bin, .idx, .json.", "metavar": "PREFIX"},
    )
    mismatched: bool = dataclasses.field(
        default=False,
        metadata={"help": "Score each prompt with another row's responses, too, as --objective kto needs.", "metavar": None},
    )


_FIELDS: dict[type, Sequence[str]] = {
    ScoringConfig: ("pairs", "mismatched"),
    CheckpointConfig: ("load",),
    ModelConfig: (
        "load_hf",
        "reference_cache",
        "transformer_impl",
        "attention_backend",
        "bf16",
        "make_vocab_size_divisible_by",
        "share_prompts",
        "logprob_chunk_tokens",
    ),
    DataConfig: ("tokens_per_microbatch",),
    ParallelConfig: (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "sequence_parallel",
        "distributed_backend",
        "distributed_timeout_minutes",
    ),
    LoggingConfig: ("debug",),
}


def score(config: Config, scoring: ScoringConfig) -> list[str]:
    """Score the data sets. Called by every rank.

    Returns:
        The directories of the scores.

    Raises:
        RmipoError: a fault the user can mend; what was computed before stays.
    """
    check_environment(wandb=False)
    if not scoring.pairs:
        raise ConfigError("nothing to score: give --pairs PREFIX (of PREFIX.bin, .idx and .json).")
    source = find_model(config)
    stores = [PairStore(prefix) for prefix in scoring.pairs]
    longest = max(int((store.lengths[:, 0] + store.lengths[:, 1:].max(axis=1)).max()) for store in stores)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_length=longest))
    refuse_impossible_layout(config, source.arch, int(os.environ.get("WORLD_SIZE", "1")))
    kinds: list[Kind] = ["matched", "mismatched"] if scoring.mismatched else ["matched"]
    for store in stores:
        _check_store(store, source, config, mismatched=scoring.mismatched)
    groups = initialize_runtime(
        config.parallel.tensor_model_parallel_size,
        config.parallel.pipeline_model_parallel_size,
        backend=config.parallel.distributed_backend,
        timeout_minutes=config.parallel.distributed_timeout_minutes,
    )
    fingerprint = on_first_rank(groups.world, lambda: weights_fingerprint(source))
    model = build_model(source.arch, config, groups)
    load_weights(source, model, groups)
    layout = conditional_layout(config, source.arch, dp_rank=groups.dp_rank, dp_size=groups.dp_size)
    directories = []
    for kind in kinds:
        keys = score_keys(stores, kind, reference=fingerprint, bf16=config.model.bf16, groups=groups)
        for store, key in zip(stores, keys, strict=True):
            directories.append(str(score_store(model, store, key, config.model.reference_cache, layout, groups)))
    shutdown_runtime()
    return directories


def _check_store(store: PairStore, source: ModelSource, config: Config, *, mismatched: bool) -> None:
    if store.manifest.tokenizer.fingerprint != load_tokenizer(str(source.assets)).info.fingerprint:
        raise DataError(
            f"--pairs {store.prefix}: made with another tokenizer than the model's in {source.assets}. Prepare it again: "
            f"tools/preprocess_preferences.py --tokenizer-model {source.assets}."
        )
    if not store.manifest.has_rejected:
        raise DataError(f"--pairs {store.prefix}: supervised data, which no objective compares with a reference.")
    layout = conditional_layout(config, source.arch, dp_rank=0, dp_size=1)
    for lengths in [store.lengths, MismatchedStore(store).lengths] if mismatched else [store.lengths]:
        sizes = layout.conditional_sizes(lengths)
        check_capacity(sizes, layout.tokens_per_microbatch, lambda row: f"pair {row} of {store.prefix}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool on this rank; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        sections = parse_fields(arguments, _FIELDS, "score_pairs.py", _DESCRIPTION)
        config = Config(
            checkpoint=sections[CheckpointConfig],
            model=sections[ModelConfig],
            data=sections[DataConfig],
            parallel=sections[ParallelConfig],
            logging=sections[LoggingConfig],
        )
        directories = score(config, sections[ScoringConfig])
    except RmipoError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        elif is_first:
            print(f"error: {error}", file=sys.stderr)
        return 1
    if is_first:
        print("\n".join(f"wrote {directory}/scores.npy" for directory in directories))
    return 0
