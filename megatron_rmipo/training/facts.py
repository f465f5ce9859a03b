"""What the ranks of a training run must agree on before it starts."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from pathlib import Path
from typing import Any

from megatron_rmipo.checkpoint.facts import read_facts, weight_facts
from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.training.plan import RunPlan


def run_facts(plan: RunPlan) -> dict[str, Any]:
    """What a rank found on its host, and where it would start by that, as :mod:`megatron_rmipo.checkpoint.facts`."""
    stores = {store.prefix: store for pairs in plan.data.collections for store in pairs.stores}
    facts = read_facts(plan.config, plan.source, list(stores.values()))
    facts["code of the objective"] = [_code_digest(part) for part in plan.objective.parts]
    if plan.reference is not None:
        known = plan.reference.source
        facts["the reference"] = str(known.directory) if known is not None else "that of the checkpoint"
        if known is not None:
            facts |= {f"the reference's {name}": value for name, value in weight_facts(known).items()}
    facts |= {f"the run's {name}": value for name, value in dataclasses.asdict(plan.start.progress).items()}
    facts |= {f"the objective's {name}": value for name, value in plan.start.objective_state.items()}
    return facts


def _code_digest(objective: Objective) -> str | None:
    """Of the file that defines it, which may be the user's own; None where there is no file."""
    try:
        return hashlib.sha256(Path(inspect.getfile(type(objective))).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return None
