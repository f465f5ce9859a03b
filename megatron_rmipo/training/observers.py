"""Who watches a run and tells of it: the reporter, what it says first, the throughput, the profiler."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from megatron_rmipo.checkpoint.source import ModelSource
from megatron_rmipo.config.schema import Config
from megatron_rmipo.model.flops import peak_flops
from megatron_rmipo.reports.profiler import StepProfiler
from megatron_rmipo.reports.reporter import Reporter
from megatron_rmipo.reports.throughput import Throughput
from megatron_rmipo.runtime.environment import costs_of_missing_kernels
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.training.progress import Progress


def open_reporter(config: Config, groups: ProcessGroups, train_iters: int, progress: Progress) -> Reporter:
    """The reporter of the run, enabled on its first rank, which also writes down the configuration.

    Raises:
        ConfigError: the log directory cannot be written.
    """
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


def say_what_runs(config: Config, source: ModelSource, groups: ProcessGroups, progress: Progress, reporter: Reporter) -> None:
    """The first words of a run: its configuration, its ranks, where it starts."""
    reporter.say("configuration:")
    for name, value in config.to_flat_dict().items():
        reporter.say(f"  {name}: {value}")
    start = f"step {progress.step} of {source.checkpoint}" if progress.step else f"{source.hf_weights or source.checkpoint}"
    reporter.say(f"ranks: {groups.world_size} (TP {groups.tp_size} x PP {groups.pp_size} x DP {groups.dp_size}); from {start}")
    for line in costs_of_missing_kernels():
        reporter.say(line)


def measure_throughput(config: Config, groups: ProcessGroups) -> Throughput:
    """What adds up the steps of the run."""
    peak = None
    if torch.cuda.is_available():
        peak = peak_flops(torch.cuda.get_device_name(), torch.bfloat16 if config.model.bf16 else torch.float32)
    return Throughput(groups.world_size, peak)


def build_profiler(config: Config, groups: ProcessGroups, progress: Progress, reporter: Reporter) -> StepProfiler:
    """The profiler of this rank; it records nothing unless ``--profile`` asks this rank for it."""
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
