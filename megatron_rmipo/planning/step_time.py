"""Seconds of a training step under a layout: what is computed, what is sent, and how long ranks wait for each other.

Two numbers are fitted to published steps of Megatron-Core on H100 GPUs (docs/scaling.md has the rows and the errors): the share
of a GPU's peak that matrix products reach, and the one that those of experts reach. The others are data sheets, or said to be
assumed where they stand. None of it was measured on a GPU by this project.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from megatron_rmipo.config.pipeline_split import stage_layers, stage_shares
from megatron_rmipo.config.schema import Config
from megatron_rmipo.data.batches.pipeline_bubble import PassCosts, Stages, least_length, simulated_length
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.memory.standing import stage_parameters, trained_parameters
from megatron_rmipo.model.flops import forward_cost_model
from megatron_rmipo.planning.communication import handover_seconds, pack_seconds, replica_seconds
from megatron_rmipo.planning.hardware import Cluster
from megatron_rmipo.planning.sizes import Sizes
from megatron_rmipo.planning.workload import Workload

# Fitted, see above.
DENSE_SHARE, EXPERT_SHARE = 0.61, 0.195
# Bytes that a pack moves for each weight of a rank besides its products: it is read twice and its fp32 gradient is added to.
WEIGHT_BYTES = 12.0
# Of them those of a backward for a frozen weight, which is read.
FROZEN_BYTES = 2.0
# Bytes that Adam moves for each number that it updates: gradient, weight and two moments in fp32, back again, a bf16 weight.
UPDATE_BYTES = 30.0


@dataclasses.dataclass(frozen=True)
class StepSeconds:
    """A step, part by part.

    Attributes:
        parts: name -> seconds; they follow each other.
        flops_per_gpu: floating point operations a second of each GPU that the loss needs.
    """

    parts: Mapping[str, float]
    flops_per_gpu: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.parts.values())


def step_seconds(
    arch: ModelArchitecture,
    config: Config,
    cluster: Cluster,
    load: Workload,
    *,
    tensor_overlapped: bool = False,
    simulated: bool = True,
) -> StepSeconds:
    """How long a step takes.

    Args:
        arch: the model.
        config: the flags.
        cluster: the machines.
        load: of a step on the costliest data-parallel rank.
        tensor_overlapped: tensor-parallel messages travel beside matrix products, as published runs have it and ours do not.
        simulated: False says of how long stages wait the least that it can be, and is soon done.
    """
    sizes = Sizes.of(config.parallel, arch.num_layers, cluster.gpus)
    parts: dict[str, float] = {}
    passes = []
    for one, tokens in zip(load.passes, load.tokens, strict=True):
        seconds = _pass_seconds(arch, config, cluster, one, tokens, tensor_overlapped=tensor_overlapped)
        for name, of_packs in seconds.items():
            parts[name] = parts.get(name, 0.0) + float(of_packs.sum()) / sizes.pp
        layers = np.asarray(sum(of_packs for name, of_packs in seconds.items() if name != "output layer"))
        # What a backward takes beyond its products is spread over both.
        back, head_back = one.back_over_forward, one.head_back_over_forward
        passes.append(PassCosts.scaled(layers / (1 + back), seconds["output layer"] / (1 + head_back), back, head_back))
    stages = Stages(stage_shares(arch.num_layers, config.parallel))
    length = simulated_length if simulated else least_length
    parts["waiting"] = length(passes, stages) - sum(parts.values())
    parts.update(_update_seconds(config, cluster, sizes, passes[-1], *trained_shard(arch, config)))
    total = sum(parts.values())
    return StepSeconds({name: each for name, each in parts.items() if each > 1e-4 * total}, load.flops / total / cluster.gpus)


def _pass_seconds(
    arch: ModelArchitecture,
    config: Config,
    cluster: Cluster,
    one: PassCosts,
    tokens: float,
    *,
    tensor_overlapped: bool,
) -> dict[str, np.ndarray]:
    """Seconds of each pack of a pass, forward and backward, all stages together, float64 ``[M]`` by name.

    ``tokens`` are of all packs.
    """
    sizes = Sizes.of(config.parallel, arch.num_layers, cluster.gpus)
    # Tokens of each pack, about: the layers cost by them.
    of_packs = tokens * one.layers / max(float(one.layers.sum()), 1e-9)
    mean = tokens / len(one.layers)
    rate = cluster.gpu.peak * DENSE_SHARE
    shards = sizes.tp * sizes.cp
    per_token = expert_flops(arch)
    dense_forward = (one.layers - per_token * of_packs) / shards / rate
    forward = dense_forward + per_token * of_packs / shards / (cluster.gpu.peak * EXPERT_SHARE)
    messages = pack_seconds(arch, config, cluster, mean)
    even = of_packs / max(mean, 1e-9)
    again = one.backward * recomputed_share(arch, config)
    exchanges = 1.0 + one.backward + again
    shard, trained = sum(shard_parameters(arch, config)), sum(trained_shard(arch, config))
    moved = WEIGHT_BYTES / 3.0 * shard
    if one.backward:
        moved += WEIGHT_BYTES * 2.0 / 3.0 * trained + FROZEN_BYTES * max(0.0, shard - trained)
    handover = handover_seconds(arch, config, cluster, mean) * sizes.pp * sizes.chunks * (1.0 + one.backward)
    return {
        "compute": forward * (1.0 + one.layers_back / np.maximum(one.layers, 1e-9)) + moved * sizes.pp / cluster.gpu.memory_rate,
        "output layer": (one.head + one.head_back) / shards / rate,
        "recomputation": forward * again + one.backward * _modules_again(arch, config, one.layers, of_packs) / shards / rate,
        "tensor parallel": (0.0 if tensor_overlapped else messages.tensor * exchanges) * even,
        # A backward gathers keys once more, and scatters their gradients.
        "context parallel": messages.context * (exchanges + one.backward * _gathers_keys(config)) * even,
        "expert parallel": messages.expert * exchanges * even,
        "pipeline parallel": handover * even,
    }


def recomputed_share(arch: ModelArchitecture, config: Config) -> float:
    """Of the layers, those whose forward runs again in the backward."""
    model = config.model
    if model.recompute_granularity != "full":
        return 0.0
    if model.recompute_method == "block":
        most = model.recompute_num_layers or 1
        chunks = [chunk for stage in stage_layers(arch.num_layers, config.parallel) for chunk in stage]
        return sum(min(most, len(chunk)) for chunk in chunks) / arch.num_layers
    return 1.0


def _modules_again(arch: ModelArchitecture, config: Config, layers: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """FLOPs of modules that a backward computes anew in packs of some FLOPs and tokens; of norms and activations none.

    They are those of selective recomputation, and attention where context-parallel ranks gather its keys.
    """
    modules = set[str]()
    if config.model.recompute_granularity == "selective":
        modules.update(config.memory.recompute_modules or ["core_attn"])
    if _gathers_keys(config):
        modules.add("core_attn")
    if not modules:
        return np.zeros_like(layers)
    attention = layers - forward_cost_model(arch, config.lora).per_token * tokens
    dense = 6.0 * arch.hidden_size * arch.ffn_hidden_size * len(arch.dense_layers) * tokens
    shared_size = arch.experts.shared_ffn_hidden_size if arch.experts else 0
    shared = 6.0 * arch.hidden_size * shared_size * len(arch.expert_layers) * tokens
    # Experts are slower than the rest.
    experts = expert_flops(arch) * tokens * DENSE_SHARE / EXPERT_SHARE
    again = {"core_attn": attention, "mlp": dense, "moe": experts + shared, "shared_experts": shared}
    return np.asarray(sum((flops for name, flops in again.items() if name in modules), start=np.zeros_like(layers)))


def _gathers_keys(config: Config) -> bool:
    """Whether context-parallel ranks gather the keys of others, which they do not keep for the backward."""
    return config.parallel.context_parallel_size > 1 and config.parallel.cp_comm_type == "all_gather"


def expert_flops(arch: ModelArchitecture) -> float:
    """FLOPs of a token's forward in the experts that it goes through, all layers together."""
    if arch.experts is None:
        return 0.0
    return 2.0 * 3 * arch.hidden_size * arch.experts.per_token * arch.experts.ffn_hidden_size * len(arch.expert_layers)


def shard_parameters(arch: ModelArchitecture, config: Config) -> tuple[float, float]:
    """Numbers in a rank's shard of the weights, mean over the stages: without experts, in experts."""
    stages = range(config.parallel.pipeline_model_parallel_size)
    dense, expert = np.mean([stage_parameters(arch, config, stage) for stage in stages], axis=0)
    return float(dense), float(expert)


def trained_shard(arch: ModelArchitecture, config: Config) -> tuple[float, float]:
    """Of a rank's numbers, mean over the stages, those that are trained: without experts, in experts."""
    stages = range(config.parallel.pipeline_model_parallel_size)
    dense, expert = np.mean([np.sum(trained_parameters(arch, config, stage), axis=0) for stage in stages], axis=0)
    return float(dense), float(expert)


def _update_seconds(
    config: Config, cluster: Cluster, sizes: Sizes, gradient: PassCosts, dense: float, expert: float
) -> dict[str, float]:
    """After the last backward, and before the first forward: what other work does not hide."""
    sent = replica_seconds(config, sizes, cluster, dense, expert)
    forward = float(gradient.layers.mean()) / sizes.pp
    hidden = (
        gradient.back_over_forward * forward if config.parallel.overlap_grad_reduce else 0.0,
        forward if config.parallel.overlap_param_gather else 0.0,
    )
    sharded = config.parallel.use_distributed_optimizer
    copies = config.parallel.num_distributed_optimizer_instances
    numbers = copies * (dense / sizes.replicas + expert / sizes.expert_replicas) if sharded else dense + expert
    return {
        "data parallel": max(0.0, sent.gradients - hidden[0]) + max(0.0, sent.weights - hidden[1]),
        "optimizer": UPDATE_BYTES * numbers / cluster.gpu.memory_rate,
    }
