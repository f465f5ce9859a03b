"""From the host to the device without the host waiting."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rmipo.runtime.groups import current_device


def to_device(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """A CPU tensor on a device, this rank's by default. The copy runs in the order of the device's work; nobody waits for it."""
    device = device or current_device()
    if device.type == "cpu":
        return tensor
    # Out of pageable memory the copy would hold the host until all work before it is done.
    return tensor.pin_memory().to(device, non_blocking=True)
