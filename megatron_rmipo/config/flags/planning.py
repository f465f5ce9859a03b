"""The flags that say which machines a plan is made for."""

from __future__ import annotations

import dataclasses
from typing import Literal

from megatron_rmipo.config.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanningConfig:
    """Planning: what a run would need and take, on machines that need not be here."""

    dry_run: bool = option(
        False,
        "Check everything but the devices of this machine, print what the layout needs and how long it takes, by estimate, and "
        "start nothing. Exit code 1 where it does not fit.",
    )
    gpus: int | None = option(None, "With --dry-run: GPUs of all nodes; unset: the ranks that torchrun started.")
    nodes: int | None = option(None, "With --dry-run: nodes that they are in; unset: 8 GPUs a node.")
    gpu: Literal["a100", "h100", "h200", "b200"] | None = option(None, "With --dry-run: kind of GPU; unset: h100.")
    gpu_memory_gb: float | None = option(None, "With --dry-run: GB of memory of a GPU; unset: what its kind has.")
    interconnect: str | None = option(
        None,
        "With --dry-run: the links within a node (nvlink, pcie4, pcie5) and between nodes (ib400 or eth100: Gbit/s for each "
        "GPU); unset: nvlink,ib400.",
        "LINKS",
    )
