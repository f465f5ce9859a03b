"""The trainer's entry point: configuration in, trained model out."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial

from megatron_rmipo.checkpoint.settle import settle_source
from megatron_rmipo.checkpoint.source import ModelSource, checkpoint_to_go_on_from, find_model
from megatron_rmipo.config.schema import Config
from megatron_rmipo.data.batches.loader import BatchBuilder
from megatron_rmipo.data.batches.order import PairOrder
from megatron_rmipo.errors import RmipoError
from megatron_rmipo.memory.report import MemoryReport
from megatron_rmipo.objectives.arguments import objective_of, parse_arguments
from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.passes.layout import batch_layout
from megatron_rmipo.runtime.environment import check_environment
from megatron_rmipo.runtime.first_failure import tell_failure
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime
from megatron_rmipo.scoring.reference import (
    ReferenceChoice,
    attach_scores,
    choose_reference,
    identify_reference,
    load_reference,
)
from megatron_rmipo.training.data import RunData, open_data
from megatron_rmipo.training.loop import Run, train
from megatron_rmipo.training.observers import build_profiler, measure_throughput, open_reporter, say_what_runs
from megatron_rmipo.training.outputs import check_outputs, own_save_directory, save_hf, save_run
from megatron_rmipo.training.resume import StartingPoint, starting_point
from megatron_rmipo.training.setup import load_training_state
from megatron_rmipo.training.validation import refuse_profiling_beyond_the_end, validate


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the arguments say. Returns the exit code: 0 done, 1 a fault the user can mend."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    shows_tracebacks = "--debug" in arguments
    try:
        config = parse_arguments(arguments)
        shows_tracebacks = config.logging.debug
        run_training(config)
    except (RmipoError, RuntimeError) as error:
        tell_failure(error, debug=shows_tracebacks)
        return 1
    return 0


def run_training(config: Config) -> bool:
    """One run. Called by every rank; everything a user can get wrong is checked before the model is built.

    Returns:
        Whether the run is complete (False where a signal or ``--exit-interval`` ended it before).

    Raises:
        RmipoError: a fault the user can mend.
    """
    check_environment(wandb=config.logging.wandb_project is not None)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    source = find_model(config)
    validate(config, source.arch, world_size)
    objective = objective_of(config)
    data = open_data(config, source, objective.needs)
    total_pairs, train_iters = data.run_length(config.training)
    refuse_profiling_beyond_the_end(config, train_iters)
    _beginning(config, source, data, objective, world_size)
    layout = partial(batch_layout, config, source.arch, objective.needs, bos_token_id=data.bos_token_id)
    least_tokens = data.check_rows_fit(layout(dp_rank=0, dp_size=1))
    check_outputs(config, source)

    groups = initialize_runtime(
        config.parallel.tensor_model_parallel_size,
        config.parallel.pipeline_model_parallel_size,
        seed=config.training.seed,
        backend=config.parallel.distributed_backend,
        timeout_minutes=config.parallel.distributed_timeout_minutes,
    )
    owner = own_save_directory(config, groups)
    verify = not config.checkpoint.no_verify_checkpoint
    source = settle_source(partial(find_model, config), groups, verify=verify, owner=owner)
    # Anew, for it may be another checkpoint than this rank had found.
    start, reference = _beginning(config, source, data, objective, world_size)
    latest_checkpoint = partial(checkpoint_to_go_on_from, config.checkpoint)
    memory = MemoryReport(config, source.arch, groups, config.log_directory, least_tokens, latest_checkpoint)
    progress = start.progress
    if reference is not None:
        progress.reference = identify_reference(reference, groups)
        with memory.explaining("loading the reference", trains=False):
            attach_scores(config, reference, progress.reference, data.collections, objective.needs, groups, memory)
    with memory.explaining("loading the model"):
        state = load_training_state(config, source, start.objective_state, groups, train_iters=train_iters)
        if objective.needs.perturbation is not None:
            assert reference is not None
            state.reference = load_reference(config, reference, progress.reference, groups)
    with open_reporter(config, groups, train_iters, progress) as reporter:
        say_what_runs(config, source, groups, progress, reporter)
        rank_layout = layout(dp_rank=groups.dp_rank, dp_size=groups.dp_size)
        run = Run(
            config=config,
            groups=groups,
            state=state,
            objective=objective,
            progress=progress,
            pairs=BatchBuilder(data.train, rank_layout),
            order=PairOrder(len(data.train), config.training.seed),
            train_iters=train_iters,
            total_pairs=total_pairs,
            held_out=BatchBuilder(data.held_out, rank_layout) if data.held_out is not None else None,
            num_held_out=data.num_held_out,
            reporter=reporter,
            throughput=measure_throughput(config, groups),
            profiler=build_profiler(config, groups, progress, reporter),
            memory=memory,
            save=partial(save_run, config, source, state, progress, groups, owner),
        )
        complete = train(run)
        if complete:
            save_hf(config, source, state, groups)
    if owner is not None:
        owner.release()
    shutdown_runtime()
    return complete


def _beginning(
    config: Config, source: ModelSource, data: RunData, objective: Objective, world_size: int
) -> tuple[StartingPoint, ReferenceChoice | None]:
    """Where the run starts, and its reference."""
    start = starting_point(config, source, data, objective)
    recorded = start.progress.reference or None
    reference = choose_reference(config, source, objective.needs, world_size, resumes=start.resumes, recorded=recorded)
    return start, reference
