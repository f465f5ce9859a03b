"""Process groups: the one module that reads Megatron's global ``parallel_state``.

Everything else is handed a :class:`ProcessGroups` value, so that it says in its arguments who must call it together.
"""

from __future__ import annotations

import dataclasses
import datetime
import random

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.runtime.cpu import install_cpu_runtime
from megatron_rmipo.runtime.environment import hide_deprecation_banners
from megatron_rmipo.runtime.rendezvous import Rendezvous


@dataclasses.dataclass(frozen=True)
class ProcessGroups:
    """The process groups this rank belongs to.

    Attributes:
        tp: ranks that share each layer and the vocabulary.
        pp: ranks that hold the stages of one model replica, first stage first.
        cp: ranks that share each row along its tokens.
        dp: ranks that hold the same shard of different replicas and read different pairs.
        dp_cp: all ranks that hold the same shard (DP x CP): those that gradients and optimizer state are spread over.
        mp: ranks of one model shard after the other (TP x PP).
        ep: ranks that hold different experts of the same layers; without experts this rank alone.
        expert_tp: ranks that share each expert.
        expert_dp: all ranks that hold the same shard of the same experts.
        world: every rank.
    """

    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    cp: dist.ProcessGroup
    dp: dist.ProcessGroup
    dp_cp: dist.ProcessGroup
    mp: dist.ProcessGroup
    ep: dist.ProcessGroup
    expert_tp: dist.ProcessGroup
    expert_dp: dist.ProcessGroup
    world: dist.ProcessGroup

    @classmethod
    def of_megatron(cls) -> ProcessGroups:
        """Those that ``parallel_state.initialize_model_parallel`` has made, whoever called it."""
        world = dist.group.WORLD
        assert world is not None
        return cls(
            tp=parallel_state.get_tensor_model_parallel_group(),
            pp=parallel_state.get_pipeline_model_parallel_group(),
            cp=parallel_state.get_context_parallel_group(),
            dp=parallel_state.get_data_parallel_group(),
            dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
            mp=parallel_state.get_model_parallel_group(),
            ep=parallel_state.get_expert_model_parallel_group(),
            expert_tp=parallel_state.get_expert_tensor_parallel_group(),
            expert_dp=parallel_state.get_expert_data_parallel_group(),
            world=world,
        )

    @property
    def tp_rank(self) -> int:
        """This rank's place in the tensor-parallel group."""
        return self.tp.rank()

    @property
    def tp_size(self) -> int:
        """Ranks of the tensor-parallel group."""
        return self.tp.size()

    @property
    def pp_rank(self) -> int:
        """This rank's pipeline stage."""
        return self.pp.rank()

    @property
    def pp_size(self) -> int:
        """Number of pipeline stages."""
        return self.pp.size()

    @property
    def cp_rank(self) -> int:
        """This rank's place in the context-parallel group."""
        return self.cp.rank()

    @property
    def cp_size(self) -> int:
        """Ranks of the context-parallel group."""
        return self.cp.size()

    @property
    def dp_rank(self) -> int:
        """This rank's place in the data-parallel group."""
        return self.dp.rank()

    @property
    def dp_size(self) -> int:
        """Ranks of the data-parallel group."""
        return self.dp.size()

    @property
    def rank(self) -> int:
        """This rank among all."""
        return self.world.rank()

    @property
    def world_size(self) -> int:
        """Number of all ranks."""
        return self.world.size()

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds tokens."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank scores."""
        return self.pp_rank == self.pp_size - 1

    def megatron_collection(self) -> ProcessGroupCollection:
        """The same groups in the form Megatron-Core's modules take."""
        return ProcessGroupCollection.use_mpu_process_groups()


def current_device() -> torch.device:
    """The device this rank computes on: its GPU, or the CPU where CUDA is absent."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def initialize_runtime(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    *,
    context_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
    num_distributed_optimizer_instances: int = 1,
    seed: int = 1234,
    backend: str | None = None,
    timeout_minutes: float = 10.0,
    rendezvous: Rendezvous | None = None,
) -> ProcessGroups:
    """Start torch.distributed and Megatron's process groups. Called once by every rank, before any model is built.

    Ranks come from torchrun's environment; without it the process is a world of one. They must agree on all arguments.

    Args:
        tensor_model_parallel_size: ranks that share each layer.
        pipeline_model_parallel_size: number of pipeline stages.
        context_parallel_size: ranks that share each row along its tokens.
        expert_model_parallel_size: ranks that hold different experts of a layer, out of all those of a stage.
        expert_tensor_parallel_size: ranks that share each expert; by default those that share each layer.
        num_distributed_optimizer_instances: copies of the distributed optimizer's state; each lies over so many times fewer
            ranks.
        seed: seeds Python, NumPy, torch and Megatron's per-rank trackers.
        backend: ``nccl`` or ``gloo``; by default nccl with CUDA, gloo without.
        timeout_minutes: a collective that waits longer than this fails on every rank.
        rendezvous: where the ranks have met; by default they meet now.

    Raises:
        ConfigError: the world size is not a multiple of TP x PP x CP, or of EP x expert TP x PP, or torchrun's environment is
            incomplete.
        RmipoError: a rank did not come.
    """
    hide_deprecation_banners()
    on_cpu = install_cpu_runtime()
    rendezvous = Rendezvous(timeout_minutes) if rendezvous is None else rendezvous
    launch = rendezvous.launch
    world_size = launch.world_size
    model_ranks = tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size
    if world_size % model_ranks:
        context = f" x --context-parallel-size {context_parallel_size}" if context_parallel_size > 1 else ""
        raise ConfigError(
            f"--tensor-model-parallel-size {tensor_model_parallel_size} x --pipeline-model-parallel-size "
            f"{pipeline_model_parallel_size}{context} needs a number of ranks that is a multiple of {model_ranks}, but there are "
            f"{world_size}. Start {model_ranks * max(1, world_size // model_ranks)} ranks with torchrun --nproc-per-node."
        )
    expert_ranks = expert_model_parallel_size * (expert_tensor_parallel_size or tensor_model_parallel_size)
    if world_size // pipeline_model_parallel_size % expert_ranks:
        raise ConfigError(
            f"--expert-model-parallel-size {expert_model_parallel_size}: experts over {expert_ranks} ranks do not divide the "
            f"{world_size // pipeline_model_parallel_size} ranks of a pipeline stage."
        )
    # From here on a rank that fails does so in a collective, for the others too.
    store = rendezvous.connect()
    if not on_cpu:
        torch.cuda.set_device(launch.local_rank)
    if not dist.is_initialized():
        timeout = datetime.timedelta(minutes=timeout_minutes)
        backend = backend or ("gloo" if on_cpu else "nccl")
        dist.init_process_group(backend, timeout=timeout, store=store, rank=launch.rank, world_size=world_size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        context_parallel_size=context_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_parallel_size,
        num_distributed_optimizer_instances=num_distributed_optimizer_instances,
        distributed_timeout_minutes=max(1, round(timeout_minutes)),
        create_gloo_process_groups=False,
    )
    _seed_everything(seed, parallel_state.get_pipeline_model_parallel_rank())
    return ProcessGroups.of_megatron()


def shutdown_runtime() -> None:
    """Destroy the process groups, so that the process may start others or exit without warnings."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _seed_everything(seed: int, pipeline_rank: int) -> None:
    # Stages hold different layers, so they start from different states; tensor-parallel ranks are told apart by Megatron.
    stage_seed = seed + 100 * pipeline_rank
    random.seed(stage_seed)
    np.random.seed(stage_seed)
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed)
