"""Seconds that ranks of a layout wait for messages, from their bytes and the links that they cross.

Tensor-, context- and expert-parallel collectives stand between matrix products and wait as they come: nothing here overlaps them.
Gradients and weights of data-parallel ranks travel beside a backward and a forward pass where the flags say so.

Shape letters: T tokens of a pack, H hidden.
"""

from __future__ import annotations

import dataclasses

from megatron_rmipo.config.schema import Config
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.planning.hardware import Cluster
from megatron_rmipo.planning.sizes import Group, Sizes, group

# Of the data sheet's rate what large messages reach, and what each message takes besides. Assumed, not measured.
LINK_SHARE, MESSAGE_SECONDS = 0.8, 15e-6
HALF_BYTES, FP32_BYTES = 2, 4


@dataclasses.dataclass(frozen=True)
class PassSeconds:
    """What one forward pass of a pack waits for, all layers of the model together, and what its backward does.

    Attributes:
        tensor, context, expert: in seconds.
    """

    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.tensor + self.context + self.expert


def ring_seconds(ranks: Group, num_bytes: float) -> float:
    """An all-gather or a reduce-scatter of so many bytes, those of all ranks together."""
    if ranks.size == 1:
        return 0.0
    share = (ranks.size - 1) / ranks.size
    return share * num_bytes / (LINK_SHARE * ranks.ring_rate) + MESSAGE_SECONDS


def exchange_seconds(ranks: Group, num_bytes: float, copies: int, *, once_a_node: bool = False) -> float:
    """An all-to-all over ranks that hold different experts.

    Args:
        ranks: they.
        num_bytes: that each rank has to give away.
        copies: experts that a token goes to, each with the same chance on each rank.
        once_a_node: a token crosses to each other node once, however many of its experts are there (DeepEP).
    """
    if ranks.size == 1:
        return 0.0
    others, each = ranks.size / ranks.local - 1, ranks.local / ranks.size
    sent = others * (1 - (1 - each) ** copies) / copies if once_a_node else 1 - each
    between = sent * num_bytes / ranks.between_rate
    within = (ranks.local - 1) / ranks.local * num_bytes / ranks.within_rate
    return max(between, within) / LINK_SHARE + MESSAGE_SECONDS


def pack_seconds(arch: ModelArchitecture, config: Config, cluster: Cluster, num_tokens: float) -> PassSeconds:
    """What the forward pass of a pack of T tokens waits for; its backward moves the same again.

    A layer gathers its input and scatters its output twice over tensor-parallel ranks; context-parallel ranks gather keys and
    values; experts get their tokens and give them back.
    """
    sizes = Sizes.of(config.parallel, arch.num_layers, cluster.gpus)
    row = num_tokens / sizes.cp * arch.hidden_size * HALF_BYTES
    # An all-reduce is both of what stands there with sequence parallelism.
    dense = 4 * len(arch.dense_layers) + 2 * len(arch.expert_layers)
    tensor = dense * ring_seconds(group(cluster, sizes.tp, 1), row)
    context = arch.num_layers * _context_seconds(arch, config, cluster, num_tokens)
    return PassSeconds(tensor, context, _expert_seconds(arch, config, cluster, row))


def _context_seconds(arch: ModelArchitecture, config: Config, cluster: Cluster, num_tokens: float) -> float:
    """Of one layer: keys and values of all tokens, or of a rank's tokens what belongs to the heads of others, and back."""
    sizes = Sizes.of(config.parallel, arch.num_layers, cluster.gpus)
    ranks, element = group(cluster, sizes.cp, sizes.tp), HALF_BYTES / sizes.tp
    if config.parallel.cp_comm_type == "a2a":
        own = num_tokens / sizes.cp * element
        there = exchange_seconds(ranks, own * (arch.query_size + 2 * arch.key_size), 1)
        return there + exchange_seconds(ranks, own * arch.context_size, 1)
    keys = 2 * arch.key_size if arch.latent is None else arch.latent.key_value_down_size * sizes.tp
    return ring_seconds(ranks, num_tokens * keys * element)


def _expert_seconds(arch: ModelArchitecture, config: Config, cluster: Cluster, row: float) -> float:
    sizes = Sizes.of(config.parallel, arch.num_layers, cluster.gpus)
    if arch.experts is None:
        return 0.0
    copies = row / sizes.tp * arch.experts.per_token
    once = config.experts.moe_token_dispatcher_type == "flex"
    exchange = 2 * exchange_seconds(group(cluster, sizes.ep, sizes.etp), copies, arch.experts.per_token, once_a_node=once)
    shared = 2 * ring_seconds(group(cluster, sizes.etp, 1), copies * sizes.etp)
    return len(arch.expert_layers) * (exchange + shared)


def handover_seconds(arch: ModelArchitecture, config: Config, cluster: Cluster, num_tokens: float) -> float:
    """What a pack of T tokens takes from a pipeline stage to the next."""
    sizes = Sizes.of(config.parallel, arch.num_layers, cluster.gpus)
    if sizes.pp == 1:
        return 0.0
    ranks_of_stage = sizes.tp * sizes.cp * sizes.dp
    rate = cluster.between_rate if ranks_of_stage >= cluster.gpus_per_node else cluster.within_rate
    shards = sizes.tp if config.parallel.sequence_parallel else 1
    num_bytes = num_tokens / sizes.cp * arch.hidden_size * HALF_BYTES / shards
    return num_bytes / (LINK_SHARE * rate) + MESSAGE_SECONDS


@dataclasses.dataclass(frozen=True)
class ReplicaSeconds:
    """What ranks with the same weights exchange in a step.

    Attributes:
        gradients: to sum them up.
        weights: to gather what each has updated.
    """

    gradients: float
    weights: float


def replica_seconds(config: Config, sizes: Sizes, cluster: Cluster, dense: float, expert: float) -> ReplicaSeconds:
    """Seconds that gradients in fp32, and weights, travel.

    Args:
        config: the flags.
        sizes: of the layout.
        cluster: the machines.
        dense, expert: numbers that a rank trains, beside experts and in them.
    """
    # Adapters are in fp32.
    element = HALF_BYTES if config.model.bf16 and not config.lora.is_on else FP32_BYTES
    groups = (
        (group(cluster, sizes.replicas, sizes.tp), dense),
        (group(cluster, sizes.expert_replicas, sizes.ep * sizes.etp), expert),
    )
    scatter = sum(ring_seconds(ranks, FP32_BYTES * numbers) for ranks, numbers in groups if numbers)
    gather = sum(ring_seconds(ranks, element * numbers) for ranks, numbers in groups if numbers)
    if config.parallel.use_distributed_optimizer:
        return ReplicaSeconds(scatter, gather)
    # All of the gradients on every rank, which then updates everything itself.
    return ReplicaSeconds(2 * scatter, 0.0)
