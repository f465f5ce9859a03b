"""What the stages of an interleaved pipeline send to each other, in an order in which none is taken for another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator, _p2p_ops
from torch import Tensor

from megatron_rmipo.model.packed_model import unwrapped
from megatron_rmipo.runtime.groups import ProcessGroups, current_device


def messages_in_order(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Arguments of Megatron's schedules with which rows of several lengths go through chunks at any number of stages."""
    if len(chunks) == 1:
        return {}
    inner = unwrapped(chunks[0])
    collection = ProcessGroups.of_megatron().megatron_collection()
    return {"p2p_communicator": ShapesInOrder(collection.pp, inner.config), "pg_collection": collection}


class ShapesInOrder(P2PCommunicator):
    """Megatron's, which sends shapes as it sends what has them, and waits for those that come alone.

    Of two stages each is before and behind the other. Megatron's own posts the shapes of both directions in the same order on
    either, to the one before and from the one before first, so that one's activation is taken for the other's gradient. It also
    waits until its own shapes are taken: for ever where a stage gives and takes at once what its neighbour, with few packs, takes
    and gives one after the other.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sent: list[Any] = []

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        """Shapes of what comes from the stage before and from the one behind; zeros where nothing comes."""
        from_prev, from_next = (self._empty() if receives else None for receives in (recv_prev, recv_next))
        requests = _p2p_ops(
            tensor_send_prev=_shape_of(tensor_send_prev),
            tensor_recv_prev=from_prev,
            tensor_send_next=_shape_of(tensor_send_next),
            tensor_recv_next=from_next,
            group=self.pp_group,
            prev_pipeline_rank=self.prev_rank,
            next_pipeline_rank=self.next_rank,
        )
        # What has the shapes was taken since, and so they were.
        for request in self._sent:
            request.wait()
        self._sent = [request for name, request in requests.items() if name.startswith("send")]
        for name, request in requests.items():
            if name.startswith("recv"):
                request.wait()
        return _as_list(from_prev), _as_list(from_next)

    @staticmethod
    def _empty() -> Tensor:
        return torch.empty(3, dtype=torch.int64, device=current_device())


def _shape_of(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.tensor(tensor.shape, dtype=torch.int64, device=current_device())


def _as_list(shape: Tensor | None) -> list[int]:
    return [0, 0, 0] if shape is None else shape.tolist()
