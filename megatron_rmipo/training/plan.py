"""What a run is, before any process group exists: all that a user can get wrong about it shows here."""

from __future__ import annotations

import dataclasses

from megatron_rmipo.checkpoint.source import Look, ModelSource, look_alone
from megatron_rmipo.config.schema import Config
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.arguments import objective_of
from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.passes.layout import batch_layout
from megatron_rmipo.scoring.reference import ReferenceChoice, choose_reference
from megatron_rmipo.training.data import RunData, open_data
from megatron_rmipo.training.resume import StartingPoint, starting_point
from megatron_rmipo.training.validation import refuse_profiling_beyond_the_end, validate


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """What a run trains, on what, from where, for how long.

    Attributes:
        config: the flags.
        source: the model that it starts from.
        objective: what is minimized.
        data: the pairs.
        start: how far it is.
        reference: of the objective, None where it needs none.
        total_pairs, train_iters: pairs and optimizer steps of the whole run.
    """

    config: Config
    source: ModelSource
    objective: Objective
    data: RunData
    start: StartingPoint
    reference: ReferenceChoice | None
    total_pairs: int
    train_iters: int

    def layout(self, *, dp_rank: int, dp_size: int) -> BatchLayout:
        """How one data-parallel rank lays its share of a batch out."""
        return _layout(self.config, self.source, self.objective, self.data, dp_rank=dp_rank, dp_size=dp_size)


def plan_run(
    config: Config, source: ModelSource, world_size: int, data: RunData | None = None, *, look: Look = look_alone
) -> RunPlan:
    """Put a run together and refuse one that cannot work.

    Args:
        config: the run's configuration.
        source: the model that it starts from.
        world_size: number of ranks.
        data: of the run, where they are open already.
        look: who looks at the disk for what all ranks of a host would see alike.

    Raises:
        RmipoError: a fault the user can mend.
    """
    validate(config, source.arch, world_size)
    _refuse_unasked_adapter(config, source)
    objective = objective_of(config)
    data = data or open_data(config, source, objective.needs)
    start = starting_point(config, source, data, objective, look=look)
    total_pairs, train_iters = data.run_length(config.training, start.progress)
    refuse_profiling_beyond_the_end(config, train_iters)
    recorded = start.progress.reference or None
    reference = choose_reference(config, source, objective.needs, world_size, resumes=start.resumes, recorded=recorded, look=look)
    data.check_rows_fit(_layout(config, source, objective, data, dp_rank=0, dp_size=1))
    return RunPlan(config, source, objective, data, start, reference, total_pairs, train_iters)


def _refuse_unasked_adapter(config: Config, source: ModelSource) -> None:
    if source.adapters is not None and not config.lora.is_on:
        ranks = sorted({shape.rank for shape in source.adapters.plan.projections.values()})
        raise ConfigError(
            f"--load {source.directory}: its checkpoints hold an adapter alone (rank {', '.join(map(str, ranks))}). Give "
            "--lora-rank and what else made it, as in the run that saved them."
        )


def _layout(
    config: Config, source: ModelSource, objective: Objective, data: RunData, *, dp_rank: int, dp_size: int
) -> BatchLayout:
    context = data.context.token_id
    return batch_layout(config, source.arch, objective.needs, context_token_id=context, dp_rank=dp_rank, dp_size=dp_size)
