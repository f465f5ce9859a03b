"""The frozen reference of a run: which model it is, and what it says of the data, computed once and kept.

Training holds no reference then, but for objectives that mix its logits with the policy's.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_rmipo.checkpoint.agreement import on_first_rank
from megatron_rmipo.config import Config
from megatron_rmipo.data.reference_scores import Scores, open_scores, score_directory
from megatron_rmipo.data.tokenize import load_tokenizer
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.model.policy import PolicyModel
from megatron_rmipo.objectives.base import LogpNeeds
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.training.inputs import RunData, conditional_layout
from megatron_rmipo.training.model_source import (
    ModelSource,
    checkpoint_source,
    hf_source,
    load_weights,
    saved_train_state,
    weights_fingerprint,
)
from megatron_rmipo.training.scoring import Kind, are_finished, score_keys, score_store
from megatron_rmipo.training.setup import build_model

_REMEDY = "Name it with --reference-load DIR (Megatron checkpoints) or --reference-hf DIR (Hugging Face)."


@dataclasses.dataclass(frozen=True)
class ReferenceChoice:
    """Which model a run's reference is.

    Attributes:
        source: its weights; None where a run goes on from its own checkpoint and nothing says where they lie.
        recorded: fingerprint of the weights that the run had as its reference before; None for a new run.
    """

    source: ModelSource | None
    recorded: str | None


def choose_reference(config: Config, source: ModelSource, needs: LogpNeeds) -> ReferenceChoice | None:
    """The reference that the flags name, else the model a new run starts from; None where the objective needs none.

    Raises:
        ConfigError: flags that do nothing or contradict each other, a reference of another vocabulary or tokenizer, or none for
            an objective that keeps it in memory.
    """
    model = config.model
    _refuse_idle_flags(config, needs)
    if not (needs.reference or needs.mismatched or needs.perturbation is not None):
        return None
    if model.reference_hf is not None and model.reference_load is not None:
        raise ConfigError("--reference-hf and --reference-load both name the reference; give one of them.")
    saved = {} if config.checkpoint.finetune else saved_train_state(source)
    recorded = saved.get("reference") or None
    if model.reference_hf is not None:
        chosen: ModelSource | None = hf_source(Path(model.reference_hf))
    elif model.reference_load is not None:
        chosen = checkpoint_source(Path(model.reference_load))
    elif not saved:
        chosen = source
    else:
        # The run goes on from a checkpoint of its own, which is no reference any more.
        chosen = hf_source(Path(model.load_hf)) if model.load_hf is not None else None
    if chosen is None and (recorded is None or needs.perturbation is not None):
        raise ConfigError(
            f"--load {source.directory}: the run goes on, but --objective {config.objective.objective} needs its reference, "
            f"which is another model than this one. {_REMEDY}"
        )
    if chosen is not None:
        _check_vocabulary(chosen, source)
    return ReferenceChoice(chosen, recorded)


def _refuse_idle_flags(config: Config, needs: LogpNeeds) -> None:
    kept = needs.reference or needs.mismatched
    resident = needs.perturbation is not None
    reason = "keeps no log-probs of its reference" if resident else "has no reference"
    for name, is_used in (("reference_hf", kept or resident), ("reference_load", kept or resident), ("reference_cache", kept)):
        if getattr(config.model, name) is not None and not is_used:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} does nothing: --objective {config.objective.objective} {reason}. Leave it out.")


def _check_vocabulary(reference: ModelSource, source: ModelSource) -> None:
    if reference.directory == source.directory:
        return
    same_tokenizer = load_tokenizer(str(reference.assets)).info.fingerprint == load_tokenizer(str(source.assets)).info.fingerprint
    if reference.arch.vocab_size != source.arch.vocab_size or not same_tokenizer:
        raise ConfigError(
            f"the reference in {reference.directory} (vocab_size {reference.arch.vocab_size}) has another tokenizer than the "
            f"model in {source.directory} (vocab_size {source.arch.vocab_size}), so their log-probs cannot be compared. {_REMEDY}"
        )


def identify_reference(choice: ReferenceChoice, groups: ProcessGroups) -> str:
    """Fingerprint of the reference's weights. All ranks call it together.

    Raises:
        ConfigError: the run had another reference before.
    """
    if choice.source is None:
        assert choice.recorded is not None
        return choice.recorded
    source = choice.source
    found = on_first_rank(groups.world, lambda: weights_fingerprint(source))
    if choice.recorded is not None and found != choice.recorded:
        raise ConfigError(
            f"{choice.source.directory} holds other weights ({found[:12]}) than the reference this run had before "
            f"({choice.recorded[:12]}). {_REMEDY}"
        )
    return found


def attach_scores(
    config: Config,
    choice: ReferenceChoice,
    fingerprint: str,
    data: RunData,
    needs: LogpNeeds,
    groups: ProcessGroups,
) -> None:
    """Give the data the reference's log-probs, computing what is missing. All ranks call it together.

    Args:
        config: the run's configuration.
        choice, fingerprint: the reference.
        data: gets the scores; its mismatched pairs are made before, where they are needed.
        needs: of the objective.
        groups: the process groups of this rank.

    Raises:
        ConfigError: something is missing, and where the reference's weights lie is not known.
        DataError: a log-prob is not finite, or cannot be written.
    """
    collections = [part for part in (data.train, data.held_out) if part is not None]
    stores = list({store.prefix: store for part in collections for store in part.stores}.values())
    # A resident reference gives its log-probs of the data as it goes.
    kinds: list[Kind] = ["matched"] if needs.reference else []
    kinds += ["mismatched"] if needs.mismatched else []
    cache = config.model.reference_cache
    model = None
    for kind in kinds:
        keys = score_keys(stores, kind, reference=fingerprint, bf16=config.model.bf16, groups=groups)
        if not are_finished(stores, keys, cache, groups):
            model = model or load_reference(config, choice, groups)
            layout = conditional_layout(config, model.architecture, dp_rank=groups.dp_rank, dp_size=groups.dp_size)
            for store, key in zip(stores, keys, strict=True):
                score_store(model, store, key, cache, layout, groups)
        scores: dict[str, Scores] = {}
        for store, key in zip(stores, keys, strict=True):
            found = open_scores(score_directory(store.prefix, cache, key), key, len(store))
            assert found is not None, "just computed"
            scores[store.prefix] = found
        for part in collections:
            target = part if kind == "matched" else part.mismatched
            assert target is not None
            target.reference_scores = [scores[store.prefix] for store in target.stores]


def load_reference(config: Config, choice: ReferenceChoice, groups: ProcessGroups) -> PolicyModel:
    """Build the reference with its weights, frozen. All ranks call it together.

    Raises:
        ConfigError: where its weights lie is not known.
    """
    if choice.source is None:
        raise ConfigError(
            "the log-probs of this run's reference are not (all) there, and so have to be computed again, but --load names a "
            f"later model. {_REMEDY}"
        )
    model = build_model(choice.source.arch, config, groups)
    load_weights(choice.source, model, groups)
    model.requires_grad_(False)
    model.eval()
    return model
