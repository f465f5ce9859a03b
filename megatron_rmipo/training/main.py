"""The trainer's entry point: configuration in, trained model out."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_rmipo.checkpoint.hf.weights import export_hf
from megatron_rmipo.checkpoint.megatron.store import load_checkpoint, save_checkpoint
from megatron_rmipo.checkpoint.source import ModelSource, find_model, load_weights
from megatron_rmipo.config.schema import Config
from megatron_rmipo.data.batches.batching import PairOrder, check_capacity
from megatron_rmipo.data.batches.loader import BatchBuilder, BatchLayout
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.errors import ConfigError, RmipoError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.memory.report import MemoryReport
from megatron_rmipo.model.flops import peak_flops
from megatron_rmipo.model.policy import PolicyModel
from megatron_rmipo.objectives.arguments import parse_arguments
from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.reports.profiler import StepProfiler
from megatron_rmipo.reports.reporter import Reporter
from megatron_rmipo.reports.throughput import Throughput
from megatron_rmipo.runtime.environment import check_environment
from megatron_rmipo.runtime.first_failure import tell_failure
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime
from megatron_rmipo.scoring.reference import attach_scores, choose_reference, identify_reference, load_reference
from megatron_rmipo.training.data import RunData, check_outputs, conditional_layout, open_data
from megatron_rmipo.training.loop import Progress, Run, train
from megatron_rmipo.training.resume import StartingPoint, starting_point
from megatron_rmipo.training.setup import TrainingState, build_model, build_training_state
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
    objective = _build_objective(config)
    data = open_data(config, source, objective.needs)
    total_pairs, train_iters = _run_length(config, data.train)
    refuse_profiling_beyond_the_end(config, train_iters)
    start = starting_point(config, source, data, objective)
    reference = choose_reference(config, source, start, objective.needs, world_size)
    data_layout = partial(_layout, config, source.arch, data, objective)
    least_tokens = _check_rows_fit(data, data_layout(dp_rank=0, dp_size=1))
    check_outputs(config)

    groups = initialize_runtime(
        config.parallel.tensor_model_parallel_size,
        config.parallel.pipeline_model_parallel_size,
        seed=config.training.seed,
        backend=config.parallel.distributed_backend,
        timeout_minutes=config.parallel.distributed_timeout_minutes,
    )
    memory = MemoryReport(config, source.arch, groups, config.log_directory, least_tokens)
    progress = start.progress
    if reference is not None:
        progress.reference = identify_reference(reference, groups)
        with memory.explaining("loading the reference", trains=False):
            attach_scores(config, reference, progress.reference, data, objective.needs, groups, memory)
    with memory.explaining("loading the model"):
        state = _load(config, source, start, groups, train_iters)
        if objective.needs.perturbation is not None:
            assert reference is not None
            state.reference = load_reference(config, reference, progress.reference, groups)
    with _reporter(config, groups, train_iters, progress) as reporter:
        _say_what_runs(config, source, groups, progress, reporter)
        rank_layout = data_layout(dp_rank=groups.dp_rank, dp_size=groups.dp_size)
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
            throughput=_throughput(config, groups),
            profiler=_profiler(config, groups, progress, reporter),
            memory=memory,
            save=partial(_save, config, source, state, progress, groups),
        )
        complete = train(run)
        if complete and config.checkpoint.save_hf:
            state.gather_parameters()
            _save_hf(config, state.policy, source, groups)
    shutdown_runtime()
    return complete


def _build_objective(config: Config) -> Objective:
    try:
        return build_objective(config.objective.objective, config.objective.options)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _layout(
    config: Config, arch: ModelArchitecture, data: RunData, objective: Objective, *, dp_rank: int, dp_size: int
) -> BatchLayout:
    needs = objective.needs
    if needs.unconditional == "bos" and data.bos_token_id is None:
        remedy = "Use another objective, or a model with a BOS token."
        if "unconditional_context" in config.objective.options:
            remedy = "Use --unconditional-context none, which leaves the first token of log p(y) unscored."
        raise ConfigError(
            f"--objective {config.objective.objective} scores responses after a BOS token, but the model's tokenizer has none. "
            f"{remedy}"
        )
    plain = conditional_layout(config, arch, dp_rank=dp_rank, dp_size=dp_size)
    return dataclasses.replace(
        plain,
        with_rejected=needs.rejected,
        unconditional=needs.unconditional,
        forward_passes=int(needs.batch) + int(needs.perturbation is not None),
        bos_token_id=data.bos_token_id,
    )


def _check_rows_fit(data: RunData, layout: BatchLayout) -> int:
    """Refuse pairs that fit no pack; the tokens of the largest one."""
    laid_out: list[tuple[np.ndarray, Callable[[int], str]]] = []
    for pairs in (data.train, data.held_out):
        if pairs is not None:
            laid_out.append((pairs.lengths, pairs.describe))
            if pairs.mismatched is not None:
                laid_out.append((pairs.mismatched.lengths, functools.partial(_describe_mismatched, pairs)))
    for lengths, describe in laid_out:
        check_capacity(layout.conditional_sizes(lengths), layout.tokens_per_microbatch, describe)
    return max(int(layout.conditional_sizes(lengths).tokens.max(initial=0)) for lengths, _ in laid_out)


def _describe_mismatched(pairs: PairCollection, index: int) -> str:
    return f"{pairs.describe(index)}, its prompt with the responses of another,"


def _reporter(config: Config, groups: ProcessGroups, train_iters: int, progress: Progress) -> Reporter:
    if groups.rank == 0:
        config.save_config(config.log_directory / "config.yaml")
    tensorboard_dir = config.logging.tensorboard_dir
    return Reporter(
        config.log_directory,
        tensorboard_dir=Path(tensorboard_dir) if tensorboard_dir else None,
        wandb_project=config.logging.wandb_project,
        wandb_exp_name=config.logging.wandb_exp_name,
        total_steps=train_iters,
        config=config.to_flat_dict(),
        enabled=groups.rank == 0,
        resumed_step=progress.step or None,
    )


def _say_what_runs(config: Config, source: ModelSource, groups: ProcessGroups, progress: Progress, reporter: Reporter) -> None:
    reporter.say("configuration:")
    for name, value in config.to_flat_dict().items():
        reporter.say(f"  {name}: {value}")
    start = f"step {progress.step} of {source.checkpoint}" if progress.step else f"{source.hf_weights or source.checkpoint}"
    reporter.say(f"ranks: {groups.world_size} (TP {groups.tp_size} x PP {groups.pp_size} x DP {groups.dp_size}); from {start}")


def _throughput(config: Config, groups: ProcessGroups) -> Throughput:
    peak = None
    if torch.cuda.is_available():
        peak = peak_flops(torch.cuda.get_device_name(), torch.bfloat16 if config.model.bf16 else torch.float32)
    return Throughput(groups.world_size, peak)


def _profiler(config: Config, groups: ProcessGroups, progress: Progress, reporter: Reporter) -> StepProfiler:
    chosen, steps = config.profiling.profile and groups.rank in config.profiling.ranks, config.profiling.steps
    if config.profiling.profile and progress.step >= steps.stop - 1:
        reporter.warn(
            f"nothing is profiled: the run goes on from step {progress.step}, after --profile-step-end {steps.stop - 1}"
        )
    # The reporter speaks for the first rank alone.
    say = reporter.say if groups.rank == 0 else partial(_say_as_rank, groups.rank)
    return StepProfiler(config.log_directory / "profile" / f"rank{groups.rank}.json.gz", steps if chosen else range(0), say)


def _say_as_rank(rank: int, text: str) -> None:
    print(f"[rank {rank}] {text}", flush=True)


def _save(config: Config, source: ModelSource, state: TrainingState, progress: Progress, groups: ProcessGroups) -> None:
    if config.checkpoint.save is None:
        return
    state.gather_parameters()
    with_optimizer = not config.checkpoint.no_save_optim
    save_checkpoint(
        Path(config.checkpoint.save),
        progress.step,
        model=state.model,
        optimizer=state.optimizer if with_optimizer else None,
        scheduler=state.scheduler if with_optimizer else None,
        train_state={**dataclasses.asdict(progress), "objective_state": dict(state.objective_state)},
        config=config.to_flat_dict(),
        assets_dir=source.assets,
        groups=groups,
        keep_last=config.checkpoint.keep_last,
    )


def _run_length(config: Config, pairs: PairCollection) -> tuple[int, int]:
    """(pairs of the run, optimizer steps of the run)."""
    batch_size = config.training.global_batch_size
    if config.training.train_iters is not None:
        return config.training.train_iters * batch_size, config.training.train_iters
    total_pairs = max(1, round((config.training.epochs or 1.0) * len(pairs)))
    return total_pairs, -(-total_pairs // batch_size)


def _load(config: Config, source: ModelSource, start: StartingPoint, groups: ProcessGroups, train_iters: int) -> TrainingState:
    policy = build_model(source.arch, config, groups)
    if source.hf_weights is not None:
        load_weights(source, policy, groups)
    state = build_training_state(policy, config, groups, train_iters=train_iters)
    state.objective_state = start.objective_state
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
    )
    if not with_optimizer:
        # Its fp32 weights were taken from the model before the checkpoint was loaded into it.
        state.optimizer.reload_model_params()
    return state


def _save_hf(config: Config, policy: PolicyModel, source: ModelSource, groups: ProcessGroups) -> None:
    assert config.checkpoint.save_hf is not None
    if groups.dp_rank == 0:
        export_hf(
            policy,
            source.arch,
            source.assets,
            Path(config.checkpoint.save_hf),
            dtype=getattr(torch, config.checkpoint.save_hf_dtype or source.arch.dtype),
            tp_group=groups.tp,
            pp_group=groups.pp,
        )
    dist.barrier(group=groups.world)
