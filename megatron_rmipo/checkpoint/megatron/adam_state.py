"""torch's Adam inside Megatron's distributed optimizer, which expects Apex's or Transformer Engine's.

Two differences matter to a checkpoint. torch's Adam makes its state at its first step, but the distributed optimizer describes it
before. And torch's Adam counts steps in each parameter's state, where the distributed optimizer leaves them unset on loading.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def make_adam_state(optimizer: Any) -> None:
    """Give parameters that have taken no step the state they would start with."""
    for part in _parts_with_torch_adam(optimizer):
        for parameter in (parameter for group in part.optimizer.param_groups for parameter in group["params"]):
            if not part.optimizer.state[parameter]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                part.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict(state)``, with torch's step counts as they were saved."""
    parts = list(_parts_with_torch_adam(optimizer))
    for part in parts:
        part._set_main_param_and_optimizer_states = partial(_set_states_and_step, part)
    try:
        optimizer.load_state_dict(state)
    finally:
        for part in parts:
            del part._set_main_param_and_optimizer_states
    for part in parts:
        # Megatron gives all parameters one step tensor, which each of them would then advance.
        for parameter_state in part.optimizer.state.values():
            parameter_state["step"] = parameter_state["step"].clone()


def _set_states_and_step(part: DistributedOptimizer, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
    # By now the parameter groups are the saved ones, and each tells how many steps it had taken.
    step = torch.tensor(float(part.optimizer.param_groups[0]["step"]))
    DistributedOptimizer._set_main_param_and_optimizer_states(part, model_param, {**tensors, "step": step})


def _parts_with_torch_adam(optimizer: Any) -> Iterator[Any]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if isinstance(part, DistributedOptimizer) and isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
            yield part
