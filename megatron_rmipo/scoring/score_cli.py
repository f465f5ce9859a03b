"""Command line of ``tools/score_pairs.py``: log-probs of prepared data under any checkpoint, kept beside the data.

Training with an objective that needs a reference finds them there; whoever else wants them maps ``scores.npy`` into memory.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any

from megatron_rmipo.checkpoint.facts import read_facts, told_facts
from megatron_rmipo.checkpoint.makers import maker_of
from megatron_rmipo.checkpoint.settle import settle_source
from megatron_rmipo.checkpoint.source import (
    find_model,
    load_model,
    look_for_model,
    weights_fingerprint,
)
from megatron_rmipo.command import DONE, STOPPED
from megatron_rmipo.config.parsing import parse_fields
from megatron_rmipo.config.schema import Config, ModelConfig
from megatron_rmipo.data.batches.fitting import check_pairs_fit, largest_pair
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.mismatch import MismatchedStore
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.data.store.reference_scores import SCORES_FILE
from megatron_rmipo.errors import ConfigError, RmipoError
from megatron_rmipo.memory.report import MemoryReport
from megatron_rmipo.model.problems.layout import refuse_impossible_layout
from megatron_rmipo.passes.layout import conditional_layout
from megatron_rmipo.runtime.environment import check_environment
from megatron_rmipo.runtime.first_failure import tell_failure
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime
from megatron_rmipo.runtime.messages import tell_stop
from megatron_rmipo.runtime.rendezvous import Rendezvous
from megatron_rmipo.runtime.signals import RunStopped, StopRequest
from megatron_rmipo.scoring.model_flags import MODEL_FLAGS, config_of
from megatron_rmipo.scoring.readable import check_store
from megatron_rmipo.scoring.score import find_missing, plan_scores, score_rows

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
    **MODEL_FLAGS,
    ModelConfig: (*MODEL_FLAGS[ModelConfig], "reference_cache"),
}


def score(config: Config, scoring: ScoringConfig, rendezvous: Rendezvous) -> list[str]:
    """Score the data sets. Called by every rank.

    Args:
        config: the model, and how it is computed.
        scoring: what to score.
        rendezvous: where the ranks meet; whatever they decide before that, each by itself, is compared there.

    Returns:
        A line for each file of scores.

    Raises:
        RmipoError: a fault the user can mend; what was computed before stays.
        RunStopped: a signal ended it; what was computed before stays.
    """
    rendezvous.timeout_minutes = config.parallel.distributed_timeout_minutes
    rendezvous.compare(told_facts(config.to_flat_dict() | dataclasses.asdict(scoring), rendezvous.launch.local_rank))
    check_environment()
    if not scoring.pairs:
        raise ConfigError("nothing to score: give --pairs PREFIX (of PREFIX.bin, .idx and .json).")
    look = rendezvous.look_once
    source = look_for_model("the model", functools.partial(find_model, config), look, maker=maker_of(config))
    stores = [PairStore(prefix) for prefix in scoring.pairs]
    longest = max(check_store(store, "--pairs", source) for store in stores)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_length=longest))
    refuse_impossible_layout(config, source.arch, rendezvous.launch.world_size)
    rows: list[Any] = [*stores, *map(MismatchedStore, stores if scoring.mismatched else [])]
    layout = conditional_layout(config, source.arch, dp_rank=0, dp_size=1)
    collections = [PairCollection([one]) for one in rows]
    for pairs in collections:
        check_pairs_fit(pairs, layout)
    facts = functools.partial(read_facts, config, source, stores)
    rendezvous.compare(look("what the ranks must agree on", facts))
    groups = initialize_runtime(**config.parallel.runtime_arguments(), rendezvous=rendezvous)
    memory = MemoryReport(
        config,
        source.arch,
        groups,
        None,
        lambda: max(largest_pair(pairs, layout) for pairs in collections),
        latest_checkpoint=lambda: None,
    )
    verify = not config.checkpoint.no_verify_checkpoint
    source = settle_source(lambda: find_model(config), groups, verify=verify, maker=maker_of(config))
    fingerprint = weights_fingerprint(source, groups)
    cache = config.model.reference_cache
    tasks = plan_scores(rows, reference=fingerprint, bf16=config.model.bf16, cache=cache, groups=groups)
    missing = find_missing(tasks, groups)
    if missing:
        stop = StopRequest(groups)
        with memory.explaining("loading the model", trains=False):
            # The fingerprint has read and compared every file.
            model = load_model(dataclasses.replace(source, checked=True), config, groups)
        own = dataclasses.replace(layout, dp_rank=groups.dp_rank, dp_size=groups.dp_size)
        for part in missing:
            score_rows(model, part, own, groups, memory, stop)
    shutdown_runtime()
    written = {part.task.directory for part in missing}
    return [f"{'wrote' if task.directory in written else 'found'} {task.directory / SCORES_FILE}" for task in tasks]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool on this rank; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with Rendezvous() as rendezvous:
            sections = parse_fields(arguments, _FIELDS, "score_pairs.py", _DESCRIPTION)
            config = config_of(sections)
            lines = score(config, sections[ScoringConfig], rendezvous)
    except (RmipoError, RuntimeError) as error:
        return tell_failure(error, debug="--debug" in arguments)
    except RunStopped as stopped:
        shutdown_runtime()
        tell_stop(str(stopped))
        return STOPPED
    if rendezvous.launch.rank == 0:
        print("\n".join(lines))
    return DONE
