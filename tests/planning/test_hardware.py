"""Machines as flags describe them, and the links over which groups of ranks meet."""

from __future__ import annotations

import pytest

from megatron_rmipo.config.flags.planning import PlanningConfig
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.planning.hardware import GIB, read_cluster
from megatron_rmipo.planning.sizes import group


def test_defaults_are_full_nodes_of_the_kind() -> None:
    cluster = read_cluster(PlanningConfig(), 24)
    assert (cluster.nodes, cluster.gpus_per_node, cluster.gpu.name, cluster.memory_gb) == (3, 8, "H100", 80)
    assert (cluster.within_rate, cluster.between_rate) == (450e9, 50e9)
    assert cluster.usable_bytes == pytest.approx(0.9 * 77.5 * GIB)
    assert str(cluster) == "24 H100 (3 nodes of 8, 80 GB, nvlink,ib400)"
    assert read_cluster(PlanningConfig(), 3).nodes == 1


def test_flags_win() -> None:
    planning = PlanningConfig(nodes=4, gpu="a100", gpu_memory_gb=40, interconnect="pcie4,eth100")
    cluster = read_cluster(planning, 8, nodes=1)
    assert (cluster.nodes, cluster.memory_gb, cluster.gpu.peak) == (4, 40, 312e12)
    assert (cluster.within_rate, cluster.between_rate) == (31.5e9, 12.5e9)


@pytest.mark.parametrize(
    ("planning", "gpus", "words"),
    [
        (PlanningConfig(nodes=3), 8, ["8 GPUs", "3 nodes", "--gpus 6", "--nodes 4 with 2 GPUs"]),
        (PlanningConfig(), 20, ["20 GPUs", "3 nodes", "--gpus 18", "--nodes 4 with 5 GPUs"]),
        (PlanningConfig(nodes=9), 2, ["2 GPUs", "9 nodes", "--nodes 2 with 1 GPUs"]),
        (PlanningConfig(gpu_memory_gb=2.0), 8, ["--gpu-memory-gb 2:", "2.5 GB"]),
        (PlanningConfig(interconnect="nvlink"), 8, ["--interconnect nvlink", "nvlink,ib400"]),
        (PlanningConfig(interconnect="nvlink,ib"), 8, ["--interconnect nvlink,ib:", "Gbit/s"]),
        (PlanningConfig(interconnect="copper,ib400"), 8, ["copper", "pcie5"]),
    ],
)
def test_machines_that_cannot_be(planning: PlanningConfig, gpus: int, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_cluster(planning, gpus)
    assert not [word for word in words if word not in str(caught.value)]


def test_more_machines_are_full_ones() -> None:
    small = read_cluster(PlanningConfig(), 2)
    assert [(one.gpus, one.nodes) for one in map(small.times, (2, 4, 8))] == [(4, 1), (8, 1), (16, 2)]


def test_links_of_a_group() -> None:
    cluster = read_cluster(PlanningConfig(), 32)
    tensor, data, lone = group(cluster, 4, 1), group(cluster, 8, 4), group(cluster, 4, 8)
    assert (tensor.local, tensor.is_local, tensor.ring_rate) == (4, True, 450e9)
    # Two of its ranks in a node, with a link each to other nodes.
    assert (data.local, data.is_local, data.ring_rate) == (2, False, 100e9)
    assert (lone.local, lone.ring_rate) == (1, 50e9)
