"""What the ranks of a command that reads a model and data must agree on, by names that a user knows.

Facts for :meth:`megatron_rmipo.runtime.rendezvous.Rendezvous.compare`; what others follow from comes first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rmipo.checkpoint.megatron.directory import METADATA_NAME
from megatron_rmipo.checkpoint.megatron.record import RECORD_NAME
from megatron_rmipo.checkpoint.source import ModelSource, weight_files
from megatron_rmipo.config.schema import Config
from megatron_rmipo.data.store.file_digests import sample_digest
from megatron_rmipo.data.store.fingerprint import content_facts
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.model.attention.packed import choose_backend
from megatron_rmipo.model.transformer_engine import transformer_engine_available
from megatron_rmipo.runtime.environment import numeric_environment

# A host may keep its logs, and the traces of errors, where and as it likes.
_OF_A_HOST = ("log_dir", "tensorboard_dir", "debug")
# Of each file of weights, of which there may be hundreds.
_SAMPLES = 8


def told_facts(flags: Mapping[str, Any], local_rank: int) -> dict[str, Any]:
    """What a rank was told, by its flags and its environment, before it reads anything.

    Args:
        flags: of the command, with their values.
        local_rank: the number of this rank's device.
    """
    own = {"--" + name.replace("_", "-"): value for name, value in flags.items() if name not in _OF_A_HOST}
    return {**numeric_environment(local_rank), **own}


def read_facts(config: Config, source: ModelSource, stores: Sequence[PairStore]) -> dict[str, Any]:
    """What a rank found on its host: the model it starts from, how that will be computed here, and the data it reads."""
    facts: dict[str, Any] = {"the model to start from": str(source.directory)}
    facts |= weight_facts(source)
    facts |= {f"the model's {name}": value for name, value in dataclasses.asdict(source.arch).items()}
    facts["attention backend"] = choose_backend(config.model.attention_backend, source.arch.least_head_size)
    facts["Transformer Engine with a GPU"] = transformer_engine_available()
    for store in stores:
        facts |= {f"{name} of {store.prefix}": value for name, value in content_facts(store).items()}
    return facts


def weight_facts(source: ModelSource) -> dict[str, Any]:
    """Which weights lie there, as this host sees them: the checkpoint, what it says of itself, samples of its files."""
    base = {} if source.base is None else weight_facts(source.base)
    if source.checkpoint is None:
        directories = [] if source.base is not None else source.weight_directories
        files = [path for directory in directories for path in weight_files(directory)]
        return base | {f"content of {path}": sample_digest(path, _SAMPLES) for path in files}
    path = source.checkpoint_path
    found = {f"the checkpoint found in {source.checkpoint}": path.name}
    files = [file for file in (path / METADATA_NAME, path / RECORD_NAME) if file.is_file()]
    return base | found | {f"content of {file}": sample_digest(file, _SAMPLES) for file in files}
