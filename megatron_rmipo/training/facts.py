"""What the ranks of a training run must agree on before it starts."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from pathlib import Path
from typing import Any

from megatron_rmipo.checkpoint.facts import read_facts
from megatron_rmipo.checkpoint.source import ModelSource
from megatron_rmipo.config.schema import Config
from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.scoring.reference import ReferenceChoice
from megatron_rmipo.training.data import RunData
from megatron_rmipo.training.resume import StartingPoint


def run_facts(
    config: Config,
    source: ModelSource,
    data: RunData,
    objective: Objective,
    start: StartingPoint,
    reference: ReferenceChoice | None,
) -> dict[str, Any]:
    """What a rank found on its host, and where it would start by that, as :mod:`megatron_rmipo.checkpoint.facts`."""
    stores = {store.prefix: store for pairs in data.collections for store in pairs.stores}
    facts = read_facts(config, source, list(stores.values()))
    facts["code of the objective"] = _code_digest(objective)
    if reference is not None:
        facts["the reference"] = str(reference.source.directory) if reference.source is not None else "that of the checkpoint"
    facts |= {f"the run's {name}": value for name, value in dataclasses.asdict(start.progress).items()}
    facts |= {f"the objective's {name}": value for name, value in start.objective_state.items()}
    return facts


def _code_digest(objective: Objective) -> str | None:
    """Of the file that defines it, which may be the user's own; None where there is no file."""
    try:
        return hashlib.sha256(Path(inspect.getfile(type(objective))).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return None
