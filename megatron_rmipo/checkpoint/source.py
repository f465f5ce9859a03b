"""Where a model's weights come from: a Hugging Face directory, or a directory of Megatron checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_rmipo.checkpoint.adapter_source import AdapterSource, adapters_of_flags, adapters_of_record
from megatron_rmipo.checkpoint.makers import KNOWN_FAMILIES, KnownFamilies, Maker, maker_of
from megatron_rmipo.checkpoint.megatron.digests import damage, gather_digests
from megatron_rmipo.checkpoint.megatron.directory import (
    METADATA_NAME,
    checkpoint_path,
    find_checkpoint,
    iterations_of,
    latest_complete_iteration,
)
from megatron_rmipo.checkpoint.megatron.loading import load_checkpoint
from megatron_rmipo.checkpoint.megatron.record import AskedIteration, CheckpointRecord, Iteration, read_record
from megatron_rmipo.checkpoint.peft.reading import CONFIG_NAME as ADAPTER_CONFIG
from megatron_rmipo.checkpoint.peft.reading import is_adapter
from megatron_rmipo.config.flag_problems import adapter_problems, refuse
from megatron_rmipo.config.flags.lora import LoraConfig, lora_problems
from megatron_rmipo.config.schema import CheckpointConfig, Config
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.errors import CheckpointError, ConfigError, DataError, RmipoError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.model.policy import Policy
from megatron_rmipo.runtime.groups import ProcessGroups

# Who looks at the disk for a rank: given what is looked for, by name, and what finds it; what that found.
Look = Callable[[str, Callable[[], Any]], Any]


def look_alone(name: str, look: Callable[[], Any]) -> Any:
    """The :data:`Look` of a rank that looks for itself."""
    return look()


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model's weights on the disk.

    Attributes:
        arch: the model.
        assets: directory of its Hugging Face config and tokenizer.
        hf_weights: directory of safetensors, or of an adapter, or None where a checkpoint is loaded.
        checkpoint: directory of Megatron checkpoints, or None.
        iteration: which of them; None without any.
        checked: whether its files were compared with their digests; they are not read for it again.
        maker: what builds it and writes it.
        base: the frozen model beneath, where this is it with adapters; a checkpoint holds those alone.
        adapters: those; None of a model without.
    """

    arch: ModelArchitecture
    assets: Path
    hf_weights: Path | None
    checkpoint: Path | None
    iteration: Iteration | None = None
    checked: bool = False
    maker: Maker = KNOWN_FAMILIES
    base: ModelSource | None = None
    adapters: AdapterSource | None = None

    @property
    def checkpoint_path(self) -> Path:
        """The folder of the one checkpoint."""
        assert self.checkpoint is not None
        assert self.iteration is not None
        return checkpoint_path(self.checkpoint, self.iteration)

    @functools.cached_property
    def record(self) -> CheckpointRecord | None:
        """What the checkpoint says of itself; None for a Hugging Face model, or a checkpoint of another program."""
        return read_record(self.checkpoint_path) if self.checkpoint is not None else None

    @property
    def is_foreign(self) -> bool:
        """Whether it is a checkpoint of another program, whose progress is not known."""
        return self.checkpoint is not None and self.record is None

    @property
    def place(self) -> tuple[str, Iteration | None]:
        """The directory that was named, and which of its checkpoints; None for a Hugging Face model. For :func:`source_at`."""
        if self.base is not None and self.checkpoint is None:
            return self.base.place
        return str(self.directory), self.iteration

    @property
    def weight_directories(self) -> list[Path]:
        """Where files of its Hugging Face weights lie: of an adapter its base model's come first."""
        if self.base is not None:
            return self.base.weight_directories
        return list(dict.fromkeys([self.assets, self.hf_weights])) if self.hf_weights is not None else []

    @property
    def directory(self) -> Path:
        """The directory that was named."""
        directory = self.hf_weights or self.checkpoint
        if directory is None:
            assert self.base is not None
            return self.base.directory
        return directory


def find_model(config: Config) -> ModelSource:
    """``--load`` where it holds checkpoints, else ``--load-hf``.

    Raises:
        ConfigError: neither is given, or ``--bridge`` is, which is not installed or does not go with other flags; or flags of
            adapters, by which the model is found, do not go together.
        CheckpointError: ``--load`` holds checkpoints of which none is complete, or none at all and ``--load-hf`` is not given.
        ConversionError: the Hugging Face model is of an unknown kind, or its weights are missing or damaged.
    """
    refuse([*lora_problems(config.lora), *adapter_problems(config)])
    load, load_hf, maker = config.checkpoint.load, config.model.load_hf, maker_of(config)
    pretrained = config.lora.pretrained_checkpoint
    if load is not None and ((load_hf or pretrained) is None or holds_checkpoints(Path(load))):
        source = checkpoint_source(Path(load), maker=maker)
        _check_adapted(source, config)
        return source
    if pretrained is not None and not config.lora.is_on:
        raise ConfigError(f"--pretrained-checkpoint {pretrained}: no adapter stands on it. Name a whole model with --load.")
    if pretrained is not None:
        return checkpoint_source(Path(pretrained), maker=maker)
    if load_hf is None:
        raise ConfigError("no model to start from: give --load-hf DIR (a Hugging Face model) or --load DIR (a checkpoint).")
    return hf_source(Path(load_hf), maker=maker)


def _check_adapted(source: ModelSource, config: Config) -> None:
    """That a checkpoint to go on from holds an adapter where one is trained."""
    holds_adapter = source.record is not None and source.record.adapter is not None
    if config.lora.is_on and not holds_adapter:
        # With these flags it would be the model beneath a new adapter.
        assert source.base is not None
        raise CheckpointError(
            f"--load {source.directory}: {source.base.checkpoint_path.name} holds a whole model. Name it with "
            "--pretrained-checkpoint to train an adapter on it, and leave --load out, or leave --lora-rank and --load-adapter "
            "out."
        )
    pretrained = config.lora.pretrained_checkpoint
    if pretrained is not None and not holds_adapter:
        raise ConfigError(
            f"--pretrained-checkpoint {pretrained} would be the base of an adapter, but {source.checkpoint_path} holds a whole "
            "model. Leave it out."
        )
    if pretrained is not None and config.model.load_hf is not None:
        raise ConfigError("--load-hf and --pretrained-checkpoint both name the frozen model; leave one out.")


def checkpoint_source(directory: Path, iteration: AskedIteration | None = None, *, maker: Maker = KNOWN_FAMILIES) -> ModelSource:
    """A complete checkpoint of a directory: the one asked for, or the latest.

    Raises:
        CheckpointError: there is none.
    """
    _, iteration = find_checkpoint(directory, iteration)
    return source_at(directory, iteration, maker=maker)


def hf_source(directory: Path, *, maker: Maker = KNOWN_FAMILIES) -> ModelSource:
    """A Hugging Face model.

    Raises:
        ConversionError: it is of an unknown kind, or its weights are missing or damaged.
    """
    source = source_at(directory, None, maker=maker)
    # Headers alone: missing, truncated or foreign weights show before anything is built.
    maker.check_weights(directory, source.arch)
    return source


def source_at(directory: Path, iteration: Iteration | None, *, maker: Maker = KNOWN_FAMILIES) -> ModelSource:
    """The model at a place where it was found before: its config is read, and none of its weights looked at.

    Raises:
        RmipoError: there is no config that says what it is.
    """
    if iteration is None:
        found = ModelSource(maker.read(directory), maker.config_of(directory), directory, None, maker=maker)
    else:
        assets = maker.assets_of(directory, iteration)
        found = ModelSource(maker.read(assets), assets, None, directory, iteration, maker=maker)
    if isinstance(maker, KnownFamilies):
        return _with_adapters(found, maker)
    return found


def _with_adapters(found: ModelSource, maker: KnownFamilies) -> ModelSource:
    """What was found, with adapters where the flags or the checkpoint say that it has some."""
    plain = dataclasses.replace(maker, lora=LoraConfig(), named_base=None)
    record = found.record.adapter if found.record is not None else None
    if record is None:
        if not maker.lora.is_on:
            return found
        base = dataclasses.replace(found, maker=plain)
        return dataclasses.replace(
            found, hf_weights=None, checkpoint=None, iteration=None, base=base, adapters=adapters_of_flags(found.arch, maker.lora)
        )
    pretrained = maker.lora.pretrained_checkpoint
    named = pretrained or maker.named_base
    where, iteration = (named, None) if named is not None else (record["base"], record["base_iteration"])
    try:
        if pretrained is not None or iteration is not None:
            base = checkpoint_source(Path(where), iteration, maker=plain)
        else:
            base = hf_source(Path(where), maker=plain)
    except RmipoError as error:
        said = "" if named is not None else f"{found.checkpoint_path} holds an adapter of the model in {where}: "
        remedy = "" if named is not None else " Name that model with --load-hf DIR, or --pretrained-checkpoint DIR."
        raise type(error)(f"{said}{error}{remedy}") from error
    adapters = adapters_of_record(found.arch, record, maker.lora, found.checkpoint_path)
    return dataclasses.replace(found, base=base, adapters=adapters)


def look_for_model(name: str, find: Callable[[], ModelSource], look: Look, *, maker: Maker = KNOWN_FAMILIES) -> ModelSource:
    """What ``find`` finds, looked for as ``look`` does; the others read its config alone.

    Raises:
        RmipoError: as ``find``, or as :func:`source_at`.
    """
    directory, iteration = look(name, lambda: find().place)
    return source_at(Path(directory), iteration, maker=maker)


def holds_checkpoints(directory: Path) -> bool:
    """Whether a directory holds checkpoints, whole or damaged: damage must be told, not passed over by starting anew."""
    # What an interrupted save left, and what was set aside, has another name.
    return (directory / "release").exists() or next(iterations_of(directory), None) is not None


def checkpoint_to_go_on_from(flags: CheckpointConfig) -> Path | None:
    """The checkpoint that a run with these flags would go on from: the last that it saved, else the one it started from."""
    for directory in (flags.save, None if flags.finetune else flags.load):
        iteration = latest_complete_iteration(Path(directory)) if directory is not None else None
        if directory is not None and iteration not in (None, "release"):
            return checkpoint_path(Path(directory), iteration)
    return None


def build_from(source: ModelSource, config: Config, groups: ProcessGroups) -> Policy:
    """This rank's part of a model: with the weights of a Hugging Face directory, or to load a checkpoint into.

    With adapters where the source says so. All ranks call it together.
    """
    if source.base is not None:
        assert source.adapters is not None
        policy = load_model(
            dataclasses.replace(source.base, checked=source.checked and source.checkpoint is None), config, groups
        )
        # An adapter belongs to the weights as they were beside it; tools have no flag for that.
        quantize_as = config.lora.quantize_base or saved_flags(source).get("quantize_base")
        source.adapters.add_to(policy, source.arch, groups, seed=config.training.seed, quantize_as=quantize_as)
        return policy
    directory = source.hf_weights or source.assets
    return source.maker.build(directory, source.arch, config, groups, weights=source.hf_weights is not None)


def load_model(source: ModelSource, config: Config, groups: ProcessGroups) -> Policy:
    """This rank's part of a model with its weights, and nothing else of a checkpoint. All ranks call it together."""
    model = build_from(source, config, groups)
    if source.checkpoint is not None:
        load_checkpoint(
            source.checkpoint,
            model=model,
            optimizer=None,
            scheduler=None,
            load_rng=False,
            groups=groups,
            iteration=source.iteration,
            verify=not source.checked,
        )
    return model


def adapter_record(source: ModelSource, groups: ProcessGroups) -> dict[str, Any] | None:
    """What a checkpoint says of the adapter that it holds; None of a model without. All ranks call it together.

    Raises:
        CheckpointError: the frozen model is another than the adapter was trained on.
    """
    if source.base is None:
        return None
    assert source.adapters is not None
    fingerprint = _base_fingerprint(source, groups)
    return {
        "plan": source.adapters.plan.as_record(),
        "base": str(source.base.directory.resolve()),
        "base_iteration": source.base.iteration,
        "base_fingerprint": fingerprint,
    }


def _base_fingerprint(source: ModelSource, groups: ProcessGroups) -> str:
    """That of the frozen model beneath adapters, which has to be the one that a checkpoint's adapter was trained on."""
    assert source.base is not None
    fingerprint = weights_fingerprint(source.base, groups)
    saved = source.record.adapter if source.record is not None else None
    if saved is not None and saved["base_fingerprint"] != fingerprint:
        raise CheckpointError(
            f"{source.checkpoint_path} holds an adapter of another model ({saved['base_fingerprint'][:12]}) than "
            f"{source.base.directory} ({fingerprint[:12]}), or of the same in another form: Hugging Face and Megatron count as "
            f"two. It was trained on {saved['base']}; name that with --load-hf or --pretrained-checkpoint."
        )
    return fingerprint


def saved_train_state(source: ModelSource) -> dict[str, Any]:
    """The progress that a run saved with the checkpoint; empty for a Hugging Face model, a converted one, or a foreign one."""
    record = _record_of_run(source)
    return dict(record.train_state) if record is not None else {}


def saved_flags(source: ModelSource) -> dict[str, Any]:
    """The flags of the run that saved the checkpoint, by name; empty where :func:`saved_train_state` is."""
    record = _record_of_run(source)
    return dict(record.config) if record is not None else {}


def _record_of_run(source: ModelSource) -> CheckpointRecord | None:
    record = source.record
    return None if record is None or record.iteration == "release" else record


def weight_files(directory: Path) -> list[Path]:
    """The files that say what the weights of a Hugging Face directory, or the changes of an adapter, are."""
    files = sorted(directory.glob("*.safetensors"))
    return [*files, directory / ADAPTER_CONFIG] if is_adapter(directory) else files


def weights_fingerprint(source: ModelSource, groups: ProcessGroups) -> str:
    """sha256 over the architecture and the contents of every weight file. All ranks call it together and share the reading.

    The same weights in another form (Hugging Face, Megatron, other shards) have another fingerprint. A checkpoint whose digests
    were checked is not read again; of one whose digests were not, every file is, and compared with its digest.

    Raises:
        CheckpointError: a file of the checkpoint is damaged, or its adapter was trained on another model than is found.
    """
    if source.base is not None and source.checkpoint is None:
        return weights_fingerprint(source.base, groups)
    if source.hf_weights is not None:
        found: dict[str, str | None] = {}
        for directory in source.weight_directories:
            sizes = {path.name: path.stat().st_size for path in weight_files(directory)}
            found |= gather_digests(directory, sizes, groups.world)
        digests: Mapping[str, str | None] = found
        names = sorted(digests)
    else:
        digests = _checkpoint_digests(source, groups)
        names = [METADATA_NAME, *sorted(name for name in digests if name.endswith(".distcp"))]
    content: dict[str, Any] = {"architecture": dataclasses.asdict(source.arch), "files": [digests[name] for name in names]}
    if source.base is not None:
        # An adapter that has not begun to learn is the same on any model.
        content["base"] = _base_fingerprint(source, groups)
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def adapted_fingerprint(base: str, adapter: Path, groups: ProcessGroups) -> str:
    """That of a model with a PEFT adapter, out of the model's. All ranks call it together."""
    sizes = {path.name: path.stat().st_size for path in weight_files(adapter)}
    digests = gather_digests(adapter, sizes, groups.world)
    return hashlib.sha256(json.dumps([base, sorted(digests.items())]).encode()).hexdigest()


def _checkpoint_digests(source: ModelSource, groups: ProcessGroups) -> Mapping[str, str | None]:
    path, record = source.checkpoint_path, source.record
    written = record.digests if record is not None else {}
    if written and source.checked:
        return written
    weights = [METADATA_NAME, *(item.name for item in path.glob("*.distcp"))]
    sizes = record.files if record is not None and written else {name: (path / name).stat().st_size for name in weights}
    found = gather_digests(path, sizes, groups.world)
    if damaged := [name for name, digest in written.items() if found[name] != digest]:
        raise CheckpointError(f"{damage(path, damaged)}. Name another checkpoint.")
    return found


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
