"""Model, DDP, optimizer and learning-rate schedule of a run, as Megatron-Core builds them."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from megatron_rmipo.checkpoint.megatron.loading import load_checkpoint
from megatron_rmipo.checkpoint.source import ModelSource, build_from
from megatron_rmipo.config.schema import Config
from megatron_rmipo.model.lora.switch import AdapterView
from megatron_rmipo.model.policy import Policy
from megatron_rmipo.objectives.base import State
from megatron_rmipo.optimizer.build import build_optimizer, build_scheduler
from megatron_rmipo.runtime.groups import ProcessGroups


class WrappedPolicy(torch.nn.ModuleList):
    """The chunks of a policy, each in Megatron's DDP wrapper."""

    @property
    def chunks(self) -> list[DistributedDataParallel]:
        """First one first."""
        chunks: list[Any] = list(self)
        return chunks

    def zero_grad_buffer(self) -> None:
        """Forget the gradients of the step before."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()


@dataclasses.dataclass
class TrainingState:
    """What a training step changes.

    Attributes:
        model: the policy in Megatron's DDP wrapper.
        policy: the policy itself.
        optimizer, scheduler: Megatron's.
        objective_state: what the objective carries from step to step; the same on every rank.
        reference: the frozen reference, for objectives that mix its logits with the policy's; it never changes. Or
            the policy as it is without the trained adapter.
    """

    model: WrappedPolicy
    policy: Policy
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    objective_state: State = dataclasses.field(default_factory=dict)
    reference: Policy | AdapterView | None = None

    def gather_parameters(self) -> None:
        """Make every rank's weights those after the last step. All ranks call it together, before weights are read.

        With ``--overlap-param-gather`` a step leaves each rank with its own share of them; the rest follows in the next forward.
        """
        for chunk in self.model.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)


def load_training_state(
    config: Config, source: ModelSource, objective_state: State, groups: ProcessGroups, *, train_iters: int
) -> TrainingState:
    """The state that a run starts from: model, optimizer and schedule, with what its source holds of them.

    All ranks call it together.

    Args:
        config: the run's configuration.
        source: the model's weights, or the checkpoint that the run goes on from.
        objective_state: what the objective carries into the first step.
        groups: the process groups of this rank.
        train_iters: optimizer steps of the whole run.

    Raises:
        CheckpointError: as :func:`megatron_rmipo.checkpoint.megatron.loading.load_checkpoint`.
    """
    policy = build_from(source, config, groups)
    state = build_training_state(policy, config, groups, train_iters=train_iters)
    state.objective_state = objective_state
    if source.checkpoint is None:
        return state
    with_optimizer = not config.checkpoint.finetune and not config.checkpoint.no_load_optim
    load_checkpoint(
        source.checkpoint,
        model=state.model,
        optimizer=state.optimizer if with_optimizer else None,
        scheduler=state.scheduler if with_optimizer else None,
        load_rng=not config.checkpoint.finetune and not config.checkpoint.no_load_rng,
        groups=groups,
        iteration=source.iteration,
        verify=not (source.checked or config.checkpoint.no_verify_checkpoint),
    )
    if not with_optimizer:
        # Its fp32 weights were taken from the model before the checkpoint was loaded into it.
        state.optimizer.reload_model_params()
    return state


def build_training_state(policy: Policy, config: Config, groups: ProcessGroups, *, train_iters: int) -> TrainingState:
    """Wrap the policy for training. All ranks call it together, after its weights are loaded.

    The optimizer takes its fp32 master weights from the policy as it is now.
    """
    collection = groups.megatron_collection()
    model = _wrap(policy, config)
    optimizer = build_optimizer(model.chunks, config, groups)
    _connect(policy, model, optimizer, collection)
    scheduler = build_scheduler(optimizer, config.optimizer, train_iters)
    return TrainingState(model, policy, optimizer, scheduler)


def _wrap(policy: Policy, run_config: Config) -> WrappedPolicy:
    parallel = run_config.parallel
    ddp_config = DistributedDataParallelConfig(
        # The buffers that gradients are summed and reduced in are those that the optimizer reads.
        grad_reduce_in_fp32=run_config.memory.main_grads_dtype == "fp32",
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        num_distributed_optimizer_instances=parallel.num_distributed_optimizer_instances,
        # A non-finite gradient skips the step, with the pairs that caused it named; DDP's own check would end the run.
        check_for_nan_in_grad=False,
    )
    config = policy.config
    modules: list[Any] = [Float16Module(config, chunk) if config.bf16 else chunk for chunk in policy]
    # Weights are loaded or seeded the same on every data-parallel rank, so there is nothing to broadcast. What later chunks
    # reduce and gather, the schedule hides behind the work of others, whole as it is; so Megatron-LM wraps them, too.
    return WrappedPolicy(
        DistributedDataParallel(config, ddp_config, module, disable_bucketing=number > 0) for number, module in enumerate(modules)
    )


def _connect(policy: Policy, model: WrappedPolicy, optimizer: MegatronOptimizer, collection: Any) -> None:
    # Megatron's schedules find these on the model's config.
    config = policy.config
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = partial(finalize_model_grads, pg_collection=collection)
    ddp_config = model.chunks[0].ddp_config
    if ddp_config.overlap_grad_reduce:
        config.no_sync_func = _of_all([chunk.no_sync for chunk in model.chunks])
        config.grad_sync_func = _of_all([chunk.start_grad_sync for chunk in model.chunks])
    if ddp_config.overlap_param_gather:
        config.param_sync_func = _of_all([chunk.start_param_sync for chunk in model.chunks])


def _of_all(functions: list[Any]) -> Any:
    """As Megatron's schedules take them: of the chunks of an interleaved pipeline a list, else the one."""
    return functions if len(functions) > 1 else functions[0]
