"""One evaluation, from flags to the numbers of every pair. Called by every rank."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rmipo.checkpoint.facts import read_facts, told_facts
from megatron_rmipo.checkpoint.makers import maker_of
from megatron_rmipo.checkpoint.settle import settle_source
from megatron_rmipo.checkpoint.source import (
    ModelSource,
    find_model,
    load_model,
    look_for_model,
    saved_train_state,
    weights_fingerprint,
)
from megatron_rmipo.config.schema import Config
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.fitting import largest_pair
from megatron_rmipo.data.encoding.context_token import find_context_token
from megatron_rmipo.data.encoding.tokenize import PreferenceTokenizer, load_tokenizer
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.evaluation.criteria import Wanted, score_by
from megatron_rmipo.evaluation.results import SetResults
from megatron_rmipo.evaluation.score_sets import OpenSet, Scoring, collect
from megatron_rmipo.evaluation.sets import EvaluationSet, Reading, SetSource, prepare_set, prepared_set
from megatron_rmipo.memory.report import MemoryReport
from megatron_rmipo.model.problems.layout import refuse_impossible_layout
from megatron_rmipo.objectives.base import LogpNeeds, State
from megatron_rmipo.passes.layout import conditional_layout
from megatron_rmipo.passes.needed_data import check_read
from megatron_rmipo.runtime.agreement import on_first_rank
from megatron_rmipo.runtime.environment import check_environment
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime
from megatron_rmipo.runtime.rendezvous import Rendezvous
from megatron_rmipo.runtime.signals import StopRequest
from megatron_rmipo.scoring.readable import check_store
from megatron_rmipo.scoring.reference import ReferenceChoice, choose_reference, identify_reference, load_reference


@dataclasses.dataclass(frozen=True)
class EvaluationPlan:
    """What is evaluated.

    Attributes:
        sources: the sets.
        wanted: what pairs are ranked by.
        chat_template, seq_length, subset_column: how raw sets are read, see :class:`megatron_rmipo.evaluation.sets.Reading`; a
            ``seq_length`` of None is what the model takes.
        cache: directory of the scores, and of raw sets while they are read; None: beside prepared data, and nowhere for raw ones.
    """

    sources: Sequence[SetSource]
    wanted: Wanted
    chat_template: str | None = None
    seq_length: int | None = None
    subset_column: str | None = None
    cache: str | None = None


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What came of it, on the first rank.

    Attributes:
        model, reference: where their weights lie; "" without a reference.
        results: of the sets, in their order.
    """

    model: str
    reference: str
    results: list[SetResults]


def evaluate(config: Config, plan: EvaluationPlan, told: Mapping[str, object], rendezvous: Rendezvous) -> Evaluated | None:
    """Score the sets and rank their pairs.

    Args:
        config: the model, its reference, and how they are computed.
        plan: what to evaluate.
        told: the flags that say so, by name; plain values, which the ranks compare.
        rendezvous: where the ranks meet.

    Returns:
        None but on the first rank.

    Raises:
        RmipoError: a fault the user can mend.
        RunStopped: a signal ended it; what was kept stays.
    """
    found = _meet(config, plan, told, rendezvous)
    source, reference = found.source, found.reference
    with contextlib.ExitStack() as stack:
        values = on_first_rank(found.groups.world, lambda: _prepare(plan, found, stack))
        sets = [_open(EvaluationSet.from_json(one), source, plan, found.stores) for one in values]
        results = _rank(found, plan, sets)
    shutdown_runtime()
    if results is None:
        return None
    return Evaluated(_place_of(source), "" if reference is None else _place_of(reference.source), results)


@dataclasses.dataclass(frozen=True)
class _Found:
    """What the flags name, as all ranks found it.

    Attributes:
        config: the flags, with the most tokens of a row.
        source, reference: the model and its reference, None without one.
        stores: prepared sets, by name.
        groups: the process groups of this rank.
    """

    config: Config
    source: ModelSource
    reference: ReferenceChoice | None
    stores: dict[str, PairStore]
    groups: ProcessGroups


def _meet(config: Config, plan: EvaluationPlan, told: Mapping[str, object], rendezvous: Rendezvous) -> _Found:
    """Look for all that is named, compare it with what the other ranks found, and connect them."""
    rendezvous.timeout_minutes = config.parallel.distributed_timeout_minutes
    rendezvous.compare(told_facts(told, rendezvous.launch.local_rank))
    check_environment()
    look, world_size = rendezvous.look_once, rendezvous.launch.world_size
    source = look_for_model("the model", functools.partial(find_model, config), look, maker=maker_of(config))
    limit = min(plan.seq_length or source.arch.longest_sequence, source.arch.longest_sequence)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_length=limit))
    reference = None
    if config.model.reference_hf is not None or config.model.reference_load is not None:
        needs = LogpNeeds(reference=True)
        reference = choose_reference(config, source, needs, world_size, resumes=False, recorded=None, look=look)
    refuse_impossible_layout(config, source.arch, world_size)
    stores = {one.name: _open_prepared(one, source) for one in plan.sources if one.is_prepared}
    facts = functools.partial(read_facts, config, source, list(stores.values()))
    rendezvous.compare(look("what the ranks must agree on", facts))
    groups = initialize_runtime(**config.parallel.runtime_arguments(), rendezvous=rendezvous)
    return _Found(config, source, reference, stores, groups)


def _place_of(source: ModelSource | None) -> str:
    assert source is not None
    return str(source.directory if source.checkpoint is None else source.checkpoint_path)


def _open_prepared(one: SetSource, source: ModelSource) -> PairStore:
    store = PairStore(one.source)
    flag = f"--data {one.name}:"
    check_store(store, flag, source)
    if store.manifest.unpaired:
        raise DataError(f"{flag} {store.prefix}: unpaired rows, in which no two answers are compared. Name a set of pairs.")
    return store


def _prepare(plan: EvaluationPlan, found: _Found, stack: contextlib.ExitStack) -> list[dict[str, object]]:
    """The sets as plain values, raw ones written to a folder that the stack removes. On the first rank."""
    cache = Path(plan.cache) if plan.cache is not None else None
    try:
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sets-", dir=cache)))
    except OSError as error:
        raise ConfigError(f"--cache {cache} cannot be written: {error}. Name another directory.") from error
    name, limit = str(found.source.assets), found.config.data.seq_length
    reading = Reading(load_tokenizer(name), name, plan.chat_template, limit, plan.subset_column)

    def prepare(one: SetSource) -> EvaluationSet:
        if one.name in found.stores:
            return prepared_set(one, len(found.stores[one.name]))
        return prepare_set(one, folder / one.name, reading)

    return [prepare(one).to_json() for one in plan.sources]


def _open(asked: EvaluationSet, source: ModelSource, plan: EvaluationPlan, stores: dict[str, PairStore]) -> OpenSet:
    tokenizer: PreferenceTokenizer = load_tokenizer(str(source.assets))
    store = stores.get(asked.name) or PairStore(asked.prefix)
    objective = plan.wanted.objective
    if objective is not None:
        flag = f"--data {asked.name}:"
        check_read(store, flag, objective.needs, f"--objective {objective.name}", lambda column: f"--objective {objective.name}")
    return OpenSet(asked, store, find_context_token(tokenizer, [store.manifest]).token_id)


def _rank(found: _Found, plan: EvaluationPlan, sets: Sequence[OpenSet]) -> list[SetResults] | None:
    """Score and rank. All ranks call it together; what comes of it is the first rank's."""
    wanted, source, reference, groups = plan.wanted, found.source, found.reference, found.groups
    config, layout = _with_room(found.config, source, sets, groups)
    memory = MemoryReport(config, source.arch, groups, None, lambda: _largest(sets, layout), latest_checkpoint=lambda: None)
    names = {one.store.prefix: one.asked.name for one in sets}
    scoring = Scoring(layout, groups, memory, StopRequest(groups), config.model.bf16, plan.cache, names)
    verify = not config.checkpoint.no_verify_checkpoint
    settled = settle_source(lambda: find_model(config), groups, verify=verify, maker=maker_of(config))
    fingerprint = weights_fingerprint(settled, groups)
    # The fingerprint has read and compared every file.
    load = lambda: load_model(dataclasses.replace(settled, checked=True), config, groups)  # noqa: E731
    by_policy = [one.rows_of_policy(wanted) for one in sets]
    policy = scoring.score([rows for its in by_policy for rows in its], fingerprint, load)
    of_reference, by_reference = [], [one.rows_of_reference(wanted) for one in sets]
    if reference is not None:
        theirs = identify_reference(reference, groups)
        rows = [rows for its in by_reference for rows in its]
        of_reference = scoring.score(rows, theirs, lambda: load_reference(config, reference, theirs, groups))
    results: list[SetResults] = []

    def compute() -> None:
        own, others = iter(policy), iter(of_reference)
        ranked = dataclasses.replace(wanted, state=_state_of(wanted, settled))
        for one, mine, its in zip(sets, by_policy, by_reference, strict=True):
            tasks = [next(own) for _ in mine], [next(others) for _ in its]
            scored = collect(one, wanted, *tasks)
            scores, are_logits = score_by(ranked, scored, one.context_token_id)
            results.append(SetResults(one.asked, scored.policy.lengths, scores, are_logits))

    on_first_rank(groups.world, compute)
    return results or None


def _with_room(config: Config, source: ModelSource, sets: Sequence[OpenSet], groups: ProcessGroups) -> tuple[Config, BatchLayout]:
    """The flags with a pack's capacity that the largest pair fits, and how this rank cuts rows then."""
    layout = conditional_layout(config, source.arch, dp_rank=groups.dp_rank, dp_size=groups.dp_size)
    capacity = max(config.data.tokens_per_microbatch, _largest(sets, layout))
    longest = max(one.store.longest for one in sets)
    data = dataclasses.replace(config.data, tokens_per_microbatch=capacity, seq_length=longest)
    return dataclasses.replace(config, data=data), dataclasses.replace(layout, tokens_per_microbatch=capacity)


def _largest(sets: Sequence[OpenSet], layout: BatchLayout) -> int:
    return max(largest_pair(PairCollection([one.store]), layout) for one in sets)


def _state_of(wanted: Wanted, source: ModelSource) -> State:
    """What the objective carries, from the checkpoint of a run with the same; else as before the first step."""
    if wanted.objective is None:
        return {}
    initial = wanted.objective.initial_state()
    saved = saved_train_state(source).get("objective_state", {})
    return saved if saved.keys() == initial.keys() else initial
