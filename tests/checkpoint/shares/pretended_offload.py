"""Megatron-Core's optimizer on host and device without a device: both its halves are here, and only their names differ."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer


def pretend_device() -> None:
    """From here on this process takes weights for those of a device, and fp32 copies of the first of them for the host's."""
    HybridDeviceOptimizer._get_sub_optimizer_param_groups = _halves
    HybridDeviceOptimizer._move_new_state_to_right_device = lambda self: None


def _halves(self: Any, offload_fraction: float) -> tuple[Any, ...]:
    """As Megatron-Core's, which asks weights whether they are on a GPU."""
    left = offload_fraction * sum(param.numel() for group in self.param_groups for param in group["params"])
    halves: tuple[list[Any], list[Any]] = ([], [])
    copies, originals, fp32 = {}, {}, {}
    for group in self.param_groups:
        host, device = ({**group, "params": []} for _ in halves)
        for param in group["params"]:
            fp32[param] = own = param.detach().clone().float()
            if left > 0:
                left -= own.numel()
                copies[param], originals[own] = own, param
            (host if own in originals else device)["params"].append(own)
        for half, part in zip(halves, (host, device), strict=True):
            half.extend([part] if part["params"] else [])
    return *halves, copies, originals, fp32
