"""Megatron's optimizers in a checkpoint, torch's Adam inside the distributed one among them.

The distributed optimizer expects Apex's or Transformer Engine's. torch's makes its state at its first step, but it is described
before; and torch's counts steps in each parameter's state, which the distributed optimizer loads as one tensor for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_rmipo.checkpoint.shares.optimizer_pieces import FORM, pieces_of, set_pieces

_PIECES, _FORM = "param_state", "param_state_sharding_type"
# In the place of a parameter, in the state of a part that holds none on this rank: the stage may have no layer with experts.
_NO_PARAMETER = "none"


def sharded_optimizer(optimizer: Any, weights: dict[str, Any], *, is_loading: bool, metadata: dict[str, Any]) -> dict[Any, Any]:
    """An optimizer's ``sharded_state_dict``, the distributed optimizer's in pieces. All ranks call it together.

    Args:
        optimizer: Megatron's.
        weights: the ``sharded_state_dict`` of the model's chunks, by their names.
        is_loading: whether it is to be loaded into.
        metadata: as Megatron's ``sharded_state_dict`` takes it.
    """
    make_adam_state(optimizer)
    parts = _parts(optimizer)
    settings: dict[str, Any] = {"steps": _steps_taken(optimizer), "is_loading": is_loading, "metadata": metadata}
    if len(parts) == 1:
        return _sharded_part(parts[0], weights, **settings)
    optimizer._synchronize_steps()
    return {number: _sharded_part(part, weights, **settings) for number, part in enumerate(parts)}


def make_adam_state(optimizer: Any) -> None:
    """Give parameters that have taken no step the state they would start with."""
    for part, adams in _torch_adams(optimizer):
        for adam in adams:
            for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
                if not adam.state[parameter]:
                    _begin(adam, parameter)
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            part.optimizer._sync_sub_optimizers_state_to_hdo()
    _count_steps_of_empty_parts(optimizer)


def _count_steps_of_empty_parts(optimizer: Any) -> None:
    """Parts that hold nothing on this rank have taken as many steps as the others, and Megatron asks each for its number."""
    for part, _ in _torch_adams(optimizer):
        if not part.optimizer.state.keys() - {_NO_PARAMETER}:
            part.optimizer.state[_NO_PARAMETER] = {"step": torch.tensor(_steps_taken(optimizer))}


def _steps_taken(optimizer: Any) -> float:
    """By the parameters of this rank; 0.0 where none of them counts its own."""
    states = [part.optimizer.state for part in _parts(optimizer) if getattr(part, "optimizer", None) is not None]
    counted = [
        own["step"] for state in states for parameter, own in state.items() if parameter != _NO_PARAMETER and "step" in own
    ]
    return max(map(float, counted), default=0.0)


def load_optimizer(optimizer: Any, state: dict[Any, Any]) -> None:
    """Give an optimizer what was loaded into the state of :func:`sharded_optimizer`."""
    parts = _parts(optimizer)
    states = [state] if len(parts) == 1 else [state[number] for number in range(len(parts))]
    # A part of which this rank holds nothing has none.
    pieces = [own.pop(_PIECES, {}) for own in states]
    optimizer.load_state_dict(state)
    for _, adams in _torch_adams(optimizer):
        # Megatron gives all parameters one step tensor, which each of them would then advance.
        for parameter_state in (parameter_state for adam in adams for parameter_state in adam.state.values()):
            if "step" in parameter_state:
                parameter_state["step"] = parameter_state["step"].clone()
    for part, own in zip(parts, pieces, strict=True):
        if isinstance(part, DistributedOptimizer):
            set_pieces(part, own)
    keeping = [part for part in parts if getattr(getattr(part, "optimizer", None), "store_param_remainders", False)]
    for chunk in keeping[0].model_chunks if keeping else []:
        # Weights halfway between two of bf16 are rounded up with remainders; other ranks were given what the model had saved.
        chunk.start_param_sync(force_sync=True)


def _sharded_part(
    part: Any, weights: dict[str, Any], *, steps: float, is_loading: bool, metadata: dict[str, Any]
) -> dict[Any, Any]:
    if not isinstance(part, DistributedOptimizer):
        state: dict[Any, Any] = part.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
        if steps:
            # The first rank's, which may hold nothing of this part, is the one that all will read.
            state.get("optimizer", state)["state"].setdefault("common_step", torch.tensor(steps))
        return state
    if is_loading:
        # Where there is no state yet, it allocates some.
        part.load_state_dict(part.state_dict())
    return {**part.state_dict(), _PIECES: pieces_of(part, weights), _FORM: FORM}


def _parts(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _torch_adams(optimizer: Any) -> Iterator[tuple[DistributedOptimizer, list[Any]]]:
    """Parts whose state torch's Adam or one like it makes, and those that make it: several where the host updates a share."""
    for part in _parts(optimizer):
        inner = getattr(part, "optimizer", None)
        own = inner.sub_optimizers if isinstance(inner, HybridDeviceOptimizer) else [inner]
        adams = [adam for adam in own if isinstance(adam, torch.optim.Adam | torch.optim.AdamW) or _keeps_main_weights(adam)]
        if isinstance(part, DistributedOptimizer) and adams:
            yield part, adams


def _keeps_main_weights(adam: Any) -> bool:
    """Whether it is precision-aware: Megatron wants its state to be there before it is described."""
    return bool(getattr(adam, "master_weights", False))


def _begin(adam: Any, parameter: torch.Tensor) -> None:
    if _keeps_main_weights(adam):
        adam.initialize_state(parameter, adam.store_param_remainders and parameter.dtype == torch.bfloat16)
        return
    moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    adam.state[parameter] = {"step": torch.tensor(0.0), **moments}
