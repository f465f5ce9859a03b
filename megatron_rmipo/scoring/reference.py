"""The frozen reference of a run: which model it is, and what it says of the data, computed once and kept.

Training holds no reference then, but for objectives that mix its logits with the policy's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_rmipo.checkpoint.makers import KNOWN_FAMILIES, Maker, maker_of
from megatron_rmipo.checkpoint.source import (
    Look,
    ModelSource,
    adapted_fingerprint,
    checkpoint_source,
    hf_source,
    load_model,
    look_alone,
    look_for_model,
    weights_fingerprint,
)
from megatron_rmipo.config.schema import Config
from megatron_rmipo.data.batches.seen import SeenPairs, seen_rows
from megatron_rmipo.data.encoding.tokenize import load_tokenizer
from megatron_rmipo.errors import ConfigError, RmipoError
from megatron_rmipo.memory.peak import forget_peak_memory
from megatron_rmipo.memory.report import MemoryReport
from megatron_rmipo.model.lora.switch import computing_with
from megatron_rmipo.model.named_tensors import REFERENCE_ADAPTER
from megatron_rmipo.model.policy import Policy
from megatron_rmipo.model.problems.layout import refuse_impossible_layout
from megatron_rmipo.objectives.base import LogpNeeds
from megatron_rmipo.passes.layout import conditional_layout
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.runtime.signals import StopRequest
from megatron_rmipo.scoring.score import find_missing, plan_scores, score_rows

_REMEDY = "Name it with --reference-load DIR (Megatron checkpoints) or --reference-hf DIR (Hugging Face)."


@dataclasses.dataclass(frozen=True)
class ReferenceChoice:
    """Which model a run's reference is.

    Attributes:
        source: its weights; None where a run goes on from its own checkpoint and nothing says where they lie.
        recorded: fingerprint of the weights that the run had as its reference before; None for a new run.
        within: whether it is the frozen model beneath the run's own adapter, without one or with ``adapter``.
        adapter: PEFT adapter that makes that model the reference; None for none.
        quantized_as: how that model's frozen weights are kept, which log-probs depend on; None: as they are.
    """

    source: ModelSource | None
    recorded: str | None
    within: bool = False
    adapter: Path | None = None
    quantized_as: str | None = None

    @property
    def active(self) -> str | None:
        """Name of the adapter that the run's model computes with as its reference, which is within it; None for none."""
        return REFERENCE_ADAPTER if self.adapter is not None else None


def choose_reference(
    config: Config,
    source: ModelSource,
    needs: LogpNeeds,
    world_size: int,
    *,
    resumes: bool,
    recorded: str | None,
    look: Look = look_alone,
) -> ReferenceChoice | None:
    """The reference that the flags name, else the model a new run starts from; None where the objective needs none.

    Args:
        config: the run's configuration.
        source: the model the run starts from.
        needs: of the objective.
        world_size: number of ranks.
        resumes: whether the run goes on from a checkpoint of its own.
        recorded: fingerprint of the reference that it had before, None for a new run.
        look: who looks for it on the disk.

    Raises:
        ConfigError: flags that do nothing or contradict each other, a reference that cannot be cut into this layout or has
            another tokenizer, or none for an objective that keeps it in memory.
    """
    model = config.model
    _refuse_idle_flags(config, needs)
    if not (needs.reference or needs.mismatched or needs.perturbation is not None):
        return None
    chosen: ModelSource | None = None
    if model.reference_hf is not None:
        chosen = _named("--reference-hf", model.reference_hf, hf_source, maker_of(config, adapters=False), look)
    elif model.reference_load is not None:
        chosen = _named("--reference-load", model.reference_load, checkpoint_source, KNOWN_FAMILIES, look)
    elif source.base is not None:
        adapter = source.adapters.directories.get(REFERENCE_ADAPTER) if source.adapters is not None else None
        return ReferenceChoice(source.base, recorded, within=True, adapter=adapter, quantized_as=config.lora.quantize_base)
    elif not resumes:
        chosen = source
    elif needs.perturbation is not None and model.load_hf is not None:
        # The run goes on from a checkpoint of its own, which is no reference any more.
        chosen = _named("--load-hf", model.load_hf, hf_source, maker_of(config, adapters=False), look)
    if chosen is None and (recorded is None or needs.perturbation is not None):
        raise ConfigError(
            f"--load {source.directory}: the run goes on, but --objective {config.objective.objective} needs its reference, "
            f"which is another model than this one. {_REMEDY}"
        )
    if chosen is not None and chosen.directory != source.directory:
        _check_vocabulary(chosen, source)
        try:
            refuse_impossible_layout(config, chosen.arch, world_size)
        except ConfigError as error:
            raise ConfigError(f"the reference in {chosen.directory}: {error}") from error
    return ReferenceChoice(chosen, recorded)


def _named(flag: str, directory: str, find: Callable[..., ModelSource], maker: Maker, look: Look = look_alone) -> ModelSource:
    try:
        return look_for_model(f"{flag} {directory}", partial(find, Path(directory), maker=maker), look, maker=maker)
    except RmipoError as error:
        raise type(error)(f"{flag} {directory}: {error}") from error


def _refuse_idle_flags(config: Config, needs: LogpNeeds) -> None:
    kept = needs.reference or needs.mismatched
    resident = needs.perturbation is not None
    reason = "keeps no log-probs of its reference" if resident else "has no reference"
    given = {
        "--reference-hf": (config.model.reference_hf, kept or resident),
        "--reference-load": (config.model.reference_load, kept or resident),
        "--reference-adapter": (config.lora.reference_adapter, kept or resident),
        "--reference-cache": (config.model.reference_cache, kept),
    }
    for flag, (value, is_used) in given.items():
        if value is not None and not is_used:
            raise ConfigError(f"{flag} does nothing: --objective {config.objective.objective} {reason}. Leave it out.")


def _check_vocabulary(reference: ModelSource, source: ModelSource) -> None:
    same_tokenizer = load_tokenizer(str(reference.assets)).info.fingerprint == load_tokenizer(str(source.assets)).info.fingerprint
    if reference.arch.vocab_size != source.arch.vocab_size or not same_tokenizer:
        raise ConfigError(
            f"the reference in {reference.directory} (vocab_size {reference.arch.vocab_size}) has another tokenizer than the "
            f"model in {source.directory} (vocab_size {source.arch.vocab_size}), so their log-probs cannot be compared. {_REMEDY}"
        )


def identify_reference(choice: ReferenceChoice, groups: ProcessGroups, base: str | None = None) -> str:
    """Fingerprint of the reference's weights. All ranks call it together.

    Args:
        choice: the reference.
        groups: the process groups of this rank.
        base: that of the model beneath the run's adapter, where it was taken: the files are not read again for it.

    Raises:
        ConfigError: the run had another reference before.
    """
    if choice.source is None:
        assert choice.recorded is not None
        return choice.recorded
    found = base if choice.within and base is not None else weights_fingerprint(choice.source, groups)
    if choice.adapter is not None:
        found = adapted_fingerprint(found, choice.adapter, groups)
    if choice.quantized_as is not None:
        found = hashlib.sha256(f"{found} {choice.quantized_as}".encode()).hexdigest()
    if choice.recorded is not None and found != choice.recorded:
        raise ConfigError(
            f"{choice.source.directory} holds other weights ({found[:12]}) than the reference this run had before "
            f"({choice.recorded[:12]}), or the same in another form: Hugging Face and Megatron count as two. {_REMEDY}"
        )
    return found


def attach_scores(
    config: Config,
    choice: ReferenceChoice,
    fingerprint: str,
    seen: Sequence[SeenPairs],
    needs: LogpNeeds,
    groups: ProcessGroups,
    memory: MemoryReport,
    stop: StopRequest,
    policy: Policy | None = None,
) -> None:
    """Give the data the reference's log-probs, computing what is missing of the pairs seen. All ranks call it together.

    Args:
        config: the run's configuration.
        choice, fingerprint: the reference.
        seen: what the run will see of which collections; these get the scores. Their mismatched pairs are made before, where
            they are needed.
        needs: of the objective.
        groups: the process groups of this rank.
        memory: explains, should memory run out.
        stop: asked before each block of rows.
        policy: the run's model, where the reference is within it.

    Raises:
        RunStopped: a signal came; what was scored is kept.
        ConfigError: something is missing, and where the reference's weights lie is not known.
        DataError: a log-prob is not finite, or cannot be written.
    """
    collections = [one.pairs for one in seen]
    matched = _distinct([store for part in collections for store in part.stores]) if needs.reference else []
    mismatched = [store for part in collections if part.mismatched is not None for store in part.mismatched.stores]
    tasks = plan_scores(
        [*matched, *_distinct(mismatched)],
        reference=fingerprint,
        bf16=config.model.bf16,
        cache=config.model.reference_cache,
        groups=groups,
    )
    missing = find_missing(tasks, groups, partial(seen_rows, seen))
    if missing:
        with _reference_model(config, choice, fingerprint, groups, policy) as model:
            layout = conditional_layout(config, model.architecture, dp_rank=groups.dp_rank, dp_size=groups.dp_size)
            for one in missing:
                score_rows(model, one, layout, groups, memory, stop)
            del model
        forget_peak_memory()
    tables = {(task.key.kind, task.rows.prefix): task.open() for task in tasks}
    for part in collections:
        for kind, pairs in part.read_under_reference(matched=needs.reference):
            pairs.reference_scores = [tables[kind, store.prefix] for store in pairs.stores]


@contextlib.contextmanager
def _reference_model(
    config: Config, choice: ReferenceChoice, fingerprint: str, groups: ProcessGroups, policy: Policy | None
) -> Iterator[Policy]:
    if not choice.within:
        yield load_reference(config, choice, fingerprint, groups)
        return
    assert policy is not None
    policy.eval()
    with computing_with(policy, choice.active):
        yield policy


def _distinct(stores: Sequence[Any]) -> list[Any]:
    return list({store.prefix: store for store in stores}.values())


def load_reference(config: Config, choice: ReferenceChoice, fingerprint: str, groups: ProcessGroups) -> Policy:
    """Build the reference with its weights, frozen. All ranks call it together.

    Where a run goes on from its own checkpoint, ``--load-hf`` is tried: it is what most runs began with.

    Raises:
        ConfigError: where its weights lie is not known.
    """
    source = choice.source
    if source is None and config.model.load_hf is not None:
        source = _named("--load-hf", config.model.load_hf, hf_source, maker_of(config, adapters=False))
        if weights_fingerprint(source, groups) != fingerprint:
            source = None
    if source is None:
        raise ConfigError(
            "the log-probs of this run's reference are not (all) there, and so have to be computed again, but --load names a "
            f"later model. {_REMEDY}"
        )
    # In the dtype that its log-probs are kept under, whatever the policy is trained in.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, fp8_format=None, fp8_recipe=None))
    # Its fingerprint was taken, and its files were compared with their digests on the way.
    model = load_model(dataclasses.replace(source, checked=True), config, groups)
    model.requires_grad_(False)
    model.eval()
    return model
