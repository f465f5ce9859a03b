"""The distributed optimizer's state as the pieces of whole tensors that a rank holds, written and read without a gather.

The distributed optimizer lays parameters end to end in buffers and gives each data-parallel rank an even stretch of them: of a
parameter that lies across a border a rank holds a flat range. A flat range is a few boxes of the parameter's tensor, and boxes
are what torch's format stores. So each rank writes what it holds and reads what it needs, and the checkpoint has the keys, shapes
and values of Megatron-Core's ``fully_reshardable`` form, which gathers everything on every rank: either loads what the other
wrote, at any layout.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_rmipo.optimizer.remainders import joined, split

FORM = "fully_reshardable"
# torch's Adam counts steps in each parameter's state; they are kept with the parameter groups.
_NO_PIECES = "step"
_Box = tuple[tuple[int, ...], tuple[int, ...]]


def pieces_of(part: DistributedOptimizer, weights: Mapping[str, Any]) -> dict[str, list[ShardedTensor]]:
    """What this rank holds of the state of ``part``, to be saved, or to be loaded into.

    Args:
        part: its state is there: parameters have taken a step, or were given what they start with.
        weights: the ``sharded_state_dict`` of the model's chunks, by their names, with the parameters themselves as data.

    Returns:
        By number of the parameter and name of the state, in the order of the flat range.
    """
    whole = {item.data: item for item in nested_values(dict(weights)) if isinstance(item, ShardedTensor | ShardedTensorFactory)}
    return {
        f"{number}.{name}": list(_pieces(whole[parameter], name, flat, start, part.distributed_optimizer_instance_id))
        for number, (parameter, start, states) in enumerate(_held(part))
        for name, flat in _flat(states).items()
    }


@torch.no_grad()
def set_pieces(part: DistributedOptimizer, pieces: Mapping[str, Sequence[torch.Tensor]]) -> None:
    """Give ``part`` what was loaded into the pieces of :func:`pieces_of`, in its order."""
    for number, (parameter, _, states) in enumerate(_held(part)):
        for name, flat in _flat(states).items():
            place = 0
            for piece in pieces[f"{number}.{name}"]:
                # As a rule it was loaded into this very memory.
                flat[place : place + piece.numel()].copy_(piece.flatten())
                place += piece.numel()
            assert place == flat.numel(), (number, name, place, flat.numel())
        _set_states(part, parameter, states)
    if isinstance(part.optimizer, HybridDeviceOptimizer):
        # What it was given it hands on to the optimizers of the host and the device.
        part.optimizer._sync_hdo_state_to_sub_optimizers()


def boxes(start: int, stop: int, shape: Sequence[int]) -> Iterator[_Box]:
    """The flat range ``[start, stop)`` of a tensor as boxes, offsets and sizes, in the range's order: at most 2 d - 1 of them."""
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:
        yield from _within(last, start - last * row, stop - last * row, shape)
        return
    if start < first * row:
        yield from _within(first - 1, start - (first - 1) * row, row, shape)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    if last * row < stop:
        yield from _within(last, 0, stop - last * row, shape)


def _within(index: int, start: int, stop: int, shape: Sequence[int]) -> Iterator[_Box]:
    for offsets, sizes in boxes(start, stop, shape[1:]):
        yield (index, *offsets), (1, *sizes)


def _held(part: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, dict[str, torch.Tensor]]]:
    """Parameters that this rank holds something of, where the range begins that it holds, and its state of that range, flat."""
    for by_dtype in part.gbuf_ranges:
        for buckets in by_dtype.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, _states(part, parameter)


def _states(part: DistributedOptimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    states: dict[str, torch.Tensor] = part._get_main_param_and_optimizer_states(parameter)
    if states["param"].dtype == torch.int16:
        # What bf16 weights lack of the fp32 ones; a checkpoint holds those.
        states["param"] = joined(_own_weights(part, parameter), states["param"])
    return states


def _set_states(part: DistributedOptimizer, parameter: torch.nn.Parameter, states: dict[str, torch.Tensor]) -> None:
    if getattr(part.optimizer, "store_param_remainders", False):
        weights, remainders = split(states["param"])
        _own_weights(part, parameter).copy_(weights)
        states = {**states, "param": remainders}
    part._set_main_param_and_optimizer_states(parameter, states)


def _own_weights(part: DistributedOptimizer, parameter: torch.nn.Parameter) -> torch.Tensor:
    """The range of a parameter that this rank updates, of the model's own weights; with a precision-aware optimizer."""
    group, place = part.model_param_group_index_map[parameter]
    weights: torch.Tensor = part.optimizer.param_groups[group]["params"][place]
    return weights.detach()


def _flat(states: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: flat.detach() for name, flat in states.items() if name != _NO_PIECES}


def _pieces(
    whole: ShardedTensor | ShardedTensorFactory, name: str, flat: torch.Tensor, start: int, instance: int
) -> Iterator[ShardedTensor]:
    for tensor, begins in _stored_tensors(whole):
        # What of the tensor lies in the range, counted from the tensor's begin.
        low, high = max(start - begins, 0), min(start + flat.numel() - begins, math.prod(tensor.local_shape))
        if low >= high:
            continue
        place = begins + low - start
        for offsets, sizes in boxes(low, high, tensor.local_shape):
            numel = math.prod(sizes)
            yield _piece(tensor, name, flat[place : place + numel], offsets, sizes, instance)
            place += numel


def _stored_tensors(whole: ShardedTensor | ShardedTensorFactory) -> Iterator[tuple[ShardedTensor, int]]:
    """The tensors that a parameter is stored as, a gate and its values say, and where each begins in the flat parameter."""
    if isinstance(whole, ShardedTensor):
        yield whole, 0
        return
    # Views of no memory tell where the parts lie.
    template = torch.empty(whole.data.shape, dtype=whole.data.dtype, device="meta")
    for tensor in nested_values(whole.build_fn(whole.key, template, whole.replica_id, None)):
        assert tensor.data.is_contiguous(), f"{tensor.key}: part of a parameter that is no stretch of it"
        yield tensor, tensor.data.storage_offset()


def _piece(
    tensor: ShardedTensor, name: str, flat: torch.Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...], instance: int
) -> ShardedTensor:
    prepended = tensor.prepend_axis_num
    shape = (1,) * prepended + sizes
    within = (0,) * prepended + offsets
    # The last number of a replica is that of the data-parallel rank, of which one in each instance holds the piece.
    assert isinstance(tensor.replica_id, tuple), tensor
    return dataclasses.replace(
        tensor,
        key=f"optimizer.state.{name}.{tensor.key}",
        data=flat.view(shape),
        dtype=flat.dtype,
        local_shape=shape,
        global_offset=tuple(first + more for first, more in zip(tensor.global_offset, within, strict=True)),
        # Pieces are no regular grid.
        axis_fragmentations=None,
        prepend_axis_num=0,
        replica_id=(*tensor.replica_id[:-1], instance),
    )
