"""What of a Megatron-Bridge configuration does not go together with preference pairs: a line each, with what would work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_rmipo.objectives.base import Objective


def transformer_of(config: Any) -> Any:
    """The TransformerConfig of a ``ConfigContainer``: its model, or what its model holds."""
    return getattr(config.model, "transformer", config.model)


def problems_of(config: Any, objective: Objective) -> list[str]:
    """A line for each setting that does not go together with the objective or with packed rows."""
    return [*_loop_problems(config), *_layout_problems(config), *_objective_problems(config, objective)]


def _loop_problems(config: Any) -> Iterator[str]:
    model, train = transformer_of(config), config.train
    if config.dataset.dataloader_type != "external":
        yield f"dataset.dataloader_type {config.dataset.dataloader_type!r}: pairs are packed into rows here; leave it 'external'"
    if not model.calculate_per_token_loss:
        yield "model.calculate_per_token_loss False would make a loss depend on how the batch is cut; call use_preferences"
    if config.ddp.average_in_collective:
        yield "ddp.average_in_collective divides gradients by the ranks beside the number of pairs; call use_preferences"
    if train.rampup_batch_size is not None:
        yield "train.rampup_batch_size changes the number of rows from step to step; leave it out"
    if train.decrease_batch_size_if_needed:
        yield "train.decrease_batch_size_if_needed changes the number of rows from step to step; leave it out"
    if config.inprocess_restart is not None and config.inprocess_restart.enabled:
        yield "inprocess_restart would go on with batches of the attempt before; leave it out"


def _layout_problems(config: Any) -> Iterator[str]:
    model = transformer_of(config)
    if model.virtual_pipeline_model_parallel_size is not None:
        yield (
            f"model.virtual_pipeline_model_parallel_size {model.virtual_pipeline_model_parallel_size}: interleaved stages are "
            "not built; leave it out"
        )
    if model.pipeline_model_parallel_size > 1 and not model.variable_seq_lengths:
        yield "model.variable_seq_lengths False: rows differ in length, and stages must tell each other; call use_preferences"
    if model.pipeline_model_parallel_size > 1 and model.deallocate_pipeline_outputs:
        yield "model.deallocate_pipeline_outputs frees what the passes read; call use_preferences"
    if config.dist.use_decentralized_pg:
        yield "dist.use_decentralized_pg: the process groups are read from Megatron's parallel state; leave it out"
    if config.dist.use_megatron_fsdp or config.dist.use_torch_fsdp2:
        yield "dist.use_megatron_fsdp, use_torch_fsdp2: packed rows go around the passes that gather weights; leave it out"


def _objective_problems(config: Any, objective: Objective) -> Iterator[str]:
    if objective.needs.perturbation is not None and config.peft is None:
        yield (
            f"objective {objective.name} keeps its reference in memory, and in a model with adapters alone there is one; give a "
            "peft, or take another objective"
        )
    if objective.initial_state() and config.checkpoint.async_save:
        yield (
            f"checkpoint.async_save: what objective {objective.name} carries from step to step would be that of a later step; "
            "save synchronously"
        )
    if objective.initial_state() and config.checkpoint.non_persistent_save_interval is not None:
        yield (
            f"checkpoint.non_persistent_save_interval: what objective {objective.name} carries from step to step is not in such "
            "checkpoints; leave it out"
        )
