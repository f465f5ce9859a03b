"""Where a model's weights come from: a Hugging Face directory, or a directory of Megatron checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rmipo.checkpoint.hf.weights import load_hf_weights, open_weights
from megatron_rmipo.checkpoint.megatron.directory import (
    checkpoint_path,
    find_checkpoint,
    hf_assets_directory,
    latest_complete_iteration,
    read_record,
)
from megatron_rmipo.checkpoint.megatron.store import load_checkpoint
from megatron_rmipo.config.schema import CheckpointConfig, Config
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.model.policy import PolicyModel
from megatron_rmipo.runtime.groups import ProcessGroups


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model's weights on the disk.

    Attributes:
        arch: the model.
        assets: directory of its Hugging Face config and tokenizer.
        hf_weights: directory of safetensors, or None where a checkpoint is loaded.
        checkpoint: directory of Megatron checkpoints, or None.
    """

    arch: ModelArchitecture
    assets: Path
    hf_weights: Path | None
    checkpoint: Path | None

    @property
    def directory(self) -> Path:
        """The directory that was named."""
        directory = self.hf_weights or self.checkpoint
        assert directory is not None
        return directory


def find_model(config: Config) -> ModelSource:
    """``--load`` where it holds checkpoints, else ``--load-hf``.

    Raises:
        ConfigError: neither is given.
        CheckpointError: ``--load`` holds checkpoints of which none is complete, or none at all and ``--load-hf`` is not given.
        ConversionError: the Hugging Face model is of an unknown kind, or its weights are missing or damaged.
    """
    load, load_hf = config.checkpoint.load, config.model.load_hf
    if load is not None and (load_hf is None or holds_checkpoints(Path(load))):
        return checkpoint_source(Path(load))
    if load_hf is None:
        raise ConfigError("no model to start from: give --load-hf DIR (a Hugging Face model) or --load DIR (a checkpoint).")
    return hf_source(Path(load_hf))


def checkpoint_source(directory: Path) -> ModelSource:
    """The latest complete checkpoint of a directory.

    Raises:
        CheckpointError: there is none.
    """
    _, iteration = find_checkpoint(directory)
    assets = hf_assets_directory(directory, iteration)
    return ModelSource(read_architecture(assets), assets, None, directory)


def hf_source(directory: Path) -> ModelSource:
    """A Hugging Face model.

    Raises:
        ConversionError: it is of an unknown kind, or its weights are missing or damaged.
    """
    arch = read_architecture(directory)
    # Headers alone: missing, truncated or foreign weights show before anything is built.
    open_weights(directory, arch)
    return ModelSource(arch, directory, directory, None)


def holds_checkpoints(directory: Path) -> bool:
    """Whether a directory holds checkpoints, whole or damaged: damage must be told, not passed over by starting anew."""
    # What an interrupted save left has another name.
    return any(path.name == "release" or path.name.removeprefix("iter_").isdigit() for path in directory.glob("*"))


def checkpoint_to_go_on_from(flags: CheckpointConfig) -> Path | None:
    """The checkpoint that a run with these flags would go on from: the last that it saved, else the one it started from."""
    for directory in (flags.save, None if flags.finetune else flags.load):
        iteration = latest_complete_iteration(Path(directory)) if directory is not None else None
        if directory is not None and iteration not in (None, "release"):
            return checkpoint_path(Path(directory), iteration)
    return None


def load_weights(source: ModelSource, model: PolicyModel, groups: ProcessGroups) -> None:
    """Load weights, and nothing else, into this rank's part of a bare model. All ranks call it together."""
    if source.hf_weights is not None:
        load_hf_weights(model, source.hf_weights, source.arch, tp_rank=groups.tp_rank, tp_size=groups.tp_size)
        return
    assert source.checkpoint is not None
    load_checkpoint(source.checkpoint, model=model, optimizer=None, scheduler=None, load_rng=False, groups=groups)


def saved_train_state(source: ModelSource) -> dict[str, Any]:
    """The progress that a run saved with the checkpoint; empty for a Hugging Face model, a converted one, or a foreign one."""
    if source.checkpoint is None:
        return {}
    record = read_record(find_checkpoint(source.checkpoint)[0])
    return {} if record is None or record.iteration == "release" else dict(record.train_state)


def weights_fingerprint(source: ModelSource, groups: ProcessGroups) -> str:
    """sha256 over the architecture and the contents of every weight file. All ranks call it together and share the reading.

    The same weights in another form (Hugging Face, Megatron, other shards) have another fingerprint.
    """
    if source.hf_weights is not None:
        files = sorted(source.hf_weights.glob("*.safetensors"))
    else:
        assert source.checkpoint is not None
        path, _ = find_checkpoint(source.checkpoint)
        files = [path / ".metadata", *sorted(path.glob("*.distcp"))]
    own = {number: _file_digest(path) for number, path in enumerate(files) if number % groups.world_size == groups.rank}
    parts: list[Any] = [None] * groups.world_size
    dist.all_gather_object(parts, own, group=groups.world)
    digests = {number: digest for part in parts for number, digest in part.items()}
    content = {"architecture": dataclasses.asdict(source.arch), "files": [digests[number] for number in sorted(digests)]}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
