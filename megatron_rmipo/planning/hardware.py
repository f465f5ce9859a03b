"""The machines that a plan is made for: GPUs and the links between them, by their data sheets."""

from __future__ import annotations

import dataclasses
import functools
import re

import torch

from megatron_rmipo.config.flags.planning import PlanningConfig
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.model.flops import peak_flops

GIB = 2**30
GPUS_PER_NODE = 8
DEFAULT_GPU, DEFAULT_LINKS = "h100", "nvlink,ib400"
# What a device has for tensors: the rest goes to the CUDA context, to libraries and NCCL's buffers, to gaps between blocks, and
# to what the estimate errs by. Assumed, not measured.
LIBRARIES_BYTES, USABLE_SHARE = 2.5 * GIB, 0.90
# Bytes a second, one direction.
_WITHIN = {"pcie4": 31.5e9, "pcie5": 63e9}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet.

    Attributes:
        name: as :func:`megatron_rmipo.model.flops.peak_flops` knows it.
        memory_gb: as it is sold; the driver shows about so many GiB.
        memory_rate: bytes a second that its memory moves.
        nvlink_rate: bytes a second, one direction, to the other GPUs of its node.
    """

    name: str
    memory_gb: float
    memory_rate: float
    nvlink_rate: float

    @functools.cached_property
    def peak(self) -> float:
        """FLOP/s at best in bfloat16, dense."""
        found = peak_flops(self.name, torch.bfloat16)
        assert found is not None
        return found


GPUS = {
    "a100": Gpu("A100", 80, 2.0e12, 300e9),
    "h100": Gpu("H100", 80, 3.35e12, 450e9),
    "h200": Gpu("H200", 141, 4.8e12, 450e9),
    "b200": Gpu("B200", 180, 8.0e12, 900e9),
}


@dataclasses.dataclass(frozen=True)
class Cluster:
    """GPUs of one kind in equal nodes.

    Attributes:
        gpus: all of them.
        nodes: how many nodes they are in.
        gpu: their kind.
        memory_gb: of each.
        links: their names, as ``--interconnect`` takes them.
        within_rate, between_rate: bytes a second for each GPU, one direction, within a node and between nodes.
    """

    gpus: int
    nodes: int
    gpu: Gpu
    memory_gb: float
    links: str
    within_rate: float
    between_rate: float

    @property
    def gpus_per_node(self) -> int:
        """GPUs of each node."""
        return self.gpus // self.nodes

    @property
    def usable_bytes(self) -> float:
        """Of a GPU's memory what tensors may fill."""
        return USABLE_SHARE * (self.memory_gb * GIB - LIBRARIES_BYTES)

    def times(self, factor: int) -> Cluster:
        """So many times the GPUs, in nodes of the same size or, where there was one with room, in full ones."""
        gpus = self.gpus * factor
        each = max(self.gpus_per_node, min(GPUS_PER_NODE, gpus))
        return dataclasses.replace(self, gpus=gpus, nodes=max(1, gpus // each))

    def __str__(self) -> str:
        per_node = f"{self.nodes} node{'s' * (self.nodes > 1)} of {self.gpus_per_node}"
        return f"{self.gpus} {self.gpu.name} ({per_node}, {self.memory_gb:g} GB, {self.links})"


def read_cluster(planning: PlanningConfig, gpus: int, nodes: int | None = None) -> Cluster:
    """The machines that the flags describe.

    Args:
        planning: the flags.
        gpus: all GPUs.
        nodes: how many nodes they are in, where ``--nodes`` does not say it; None: full ones.

    Raises:
        ConfigError: they cannot be so many in so many nodes, or a link is not known.
    """
    nodes = planning.nodes or nodes or -(-gpus // GPUS_PER_NODE)
    if gpus % nodes:
        more = next(number for number in range(min(nodes, gpus), gpus + 1) if gpus % number == 0)
        raise ConfigError(
            f"{gpus} GPUs are not equally many on each of {nodes} nodes; --gpus {nodes * max(1, gpus // nodes)}, or --nodes "
            f"{more} with {gpus // more} GPUs each, would work."
        )
    gpu = GPUS[planning.gpu or DEFAULT_GPU]
    links = planning.interconnect or DEFAULT_LINKS
    within, between = _rates(links, gpu)
    cluster = Cluster(gpus, nodes, gpu, planning.gpu_memory_gb or gpu.memory_gb, links, within, between)
    if cluster.usable_bytes <= 0:
        raise ConfigError(
            f"--gpu-memory-gb {cluster.memory_gb:g}: libraries alone take {LIBRARIES_BYTES / GIB:g} GB of it; give the memory of "
            "one GPU, as 80."
        )
    return cluster


def _rates(links: str, gpu: Gpu) -> tuple[float, float]:
    names = links.split(",")
    within = {"nvlink": gpu.nvlink_rate, **_WITHIN}
    between = re.fullmatch(r"(?:ib|eth)([1-9]\d*)", names[-1])
    if len(names) != 2 or names[0] not in within or between is None:
        raise ConfigError(
            f"--interconnect {links}: two links are needed, the one within a node ({', '.join(within)}) and the one between "
            "nodes (ib or eth with the Gbit/s for each GPU), as in nvlink,ib400."
        )
    return within[names[0]], int(between[1]) / 8 * 1e9
