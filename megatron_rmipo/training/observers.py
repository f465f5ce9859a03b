"""Who watches a run and tells of it: the reporter, what it says first, the throughput, the profiler."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from megatron_rmipo.checkpoint.peft.reading import dropout_of
from megatron_rmipo.checkpoint.source import ModelSource
from megatron_rmipo.config.flags.memory import MemoryConfig
from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.schema import Config, ModelConfig
from megatron_rmipo.data.encoding.context_token import ContextToken
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.foreign import ForeignArchitecture
from megatron_rmipo.families.tensors import active_parameters, num_parameters
from megatron_rmipo.model.attention.packed import choose_backend
from megatron_rmipo.model.flops import peak_flops
from megatron_rmipo.model.lora.numbers import describe_trained
from megatron_rmipo.model.policy import Policy
from megatron_rmipo.model.problems.experts import expert_tensor_size
from megatron_rmipo.reports.held_out import FEWEST_PAIRS
from megatron_rmipo.reports.profiler import StepProfiler
from megatron_rmipo.reports.reporter import Reporter
from megatron_rmipo.reports.throughput import Throughput
from megatron_rmipo.reports.timers import StageClock
from megatron_rmipo.reports.trackers.opening import open_trackers
from megatron_rmipo.runtime.agreement import on_first_rank
from megatron_rmipo.runtime.environment import costs_of_missing_kernels
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.training.course.run import Run
from megatron_rmipo.training.pipeline_advice import tell_pipeline
from megatron_rmipo.training.progress import Progress
from megatron_rmipo.training.resume import StartingPoint


def open_reporter(config: Config, groups: ProcessGroups, train_iters: int, progress: Progress) -> Reporter:
    """The reporter of the run, enabled on its first rank, which also writes down the configuration. All ranks call it together.

    Raises:
        ConfigError: on every rank: the log directory cannot be written, or a package that was asked for is missing.
    """
    resumed_step = progress.step or None
    build = partial(Reporter, config.log_directory, total_steps=train_iters, resumed_step=resumed_step)
    opened: list[Reporter] = []

    def open_here() -> None:
        config.save_config(config.log_directory / "config.yaml")
        # First, so that a run that cannot start leaves an earlier one's metrics.jsonl alone.
        trackers = open_trackers(config.logging, config.log_directory, config.to_flat_dict(), resumed_step)
        opened.append(build(trackers=trackers))

    on_first_rank(groups.world, open_here)
    return opened[0] if opened else build(enabled=False)


def say_what_runs(run: Run, source: ModelSource, start: StartingPoint, context: ContextToken) -> None:
    """The first words of a run: what is trained on what, for how long, how, and where it goes; then what may not be meant."""
    config, progress, say = run.config, run.progress, run.reporter.say
    say(f"model: {_size(source.arch)} ({source.arch.family}), {_where_it_starts(source, progress)}")
    say(f"data: {len(run.pairs.pairs):,} pairs to train on, {_held_out(run)}")
    if config.lora.is_on:
        say(f"trained: {describe_trained(source.arch, config.lora)}")
    options = ", ".join(f"{name} {value}" for name, value in config.objective.options.items())
    weighted = ", losses times each pair's weight" if config.objective.pair_weight else ""
    say(f"objective: {config.objective.objective}" + (f" ({options})" if options else "") + weighted)
    _say_reference(run, source)
    _say_context(run.objective.needs.unconditional, context, run.reporter)
    epochs = run.total_pairs / len(run.pairs.pairs)
    say(f"length: {run.train_iters:,} steps of {config.training.global_batch_size:,} pairs, {epochs:.3g} epochs")
    optimizer = config.optimizer
    say(f"optimizer: {optimizer.optimizer}, lr {optimizer.lr:g} {optimizer.lr_decay_style}, clip grad {optimizer.clip_grad:g}")
    say(f"layout: {describe_layout(run.groups, config.parallel)}")
    tell_pipeline(run)
    attention = choose_backend(config.model.attention_backend, source.arch.least_head_size)
    say(f"precision: {describe_precision(config.model, config.memory)}; attention {attention}")
    outputs = config.checkpoint
    every = f" every {outputs.save_interval} steps" if outputs.save_interval else " at the end"
    final = outputs.save_hf or "none (--save-hf)"
    if source.adapters is not None:
        final += f"; adapter: {config.lora.save_adapter or 'none (--save-adapter)'}"
    say(f"checkpoints: {outputs.save + every if outputs.save else 'none (--save)'}; final model: {final}")
    say(f"logs, and the whole configuration as config.yaml: {config.log_directory}")
    for line in costs_of_missing_kernels():
        say(line)
    if start.warning:
        run.reporter.warn(start.warning)
    if config.lora.load_adapter is not None and run.groups.rank == 0 and (share := dropout_of(Path(config.lora.load_adapter))):
        run.reporter.warn(f"--load-adapter {config.lora.load_adapter} was trained with dropout {share:g}; here there is none.")
    if config.training.global_batch_size > len(run.pairs.pairs):
        run.reporter.warn(
            f"--global-batch-size {config.training.global_batch_size} is more than the {len(run.pairs.pairs)} pairs to train on: "
            "an epoch is less than one full step."
        )
    _tell_unread_columns(run)
    for one in run.held_out_sets:
        warn_of_few_pairs(one.num_pairs, config.training.eval_pairs, run.reporter, one.name)


def _tell_unread_columns(run: Run) -> None:
    """Say what of the data the run does not read, and what would."""
    builders = [run.pairs, *(one.batches for one in run.held_out_sets)]
    stores = [store for builder in builders for store in builder.pairs.stores]
    there = dict.fromkeys(column for store in stores for column in store.manifest.pair_columns)
    for column in there:
        if column not in run.objective.needs.columns:
            flag = f"--pair-{column}" + ("" if column == "weight" else " of --objective dpo or simpo")
            run.reporter.say(f"note: the data have a {column} beside their pairs, which is not read; {flag} reads it")


def _say_reference(run: Run, source: ModelSource) -> None:
    """Which reference an adapter that goes on from another one has, for that it is not the model that the run starts from."""
    needs, flags = run.objective.needs, run.config
    if not (needs.reference or needs.mismatched or needs.perturbation is not None) or source.base is None:
        return
    if flags.model.reference_hf is None and flags.model.reference_load is None:
        if flags.lora.reference_adapter is not None:
            run.reporter.say(f"reference: {source.base.directory} with the adapter in {flags.lora.reference_adapter}")
        elif flags.lora.load_adapter is not None:
            run.reporter.say(f"reference: {source.base.directory} without an adapter (--reference-adapter names one)")


def _say_context(unconditional: str | None, context: ContextToken, reporter: Reporter) -> None:
    """What stands before a response in log p(y), where the objective reads that; a warning where it is not what was asked for."""
    if unconditional == "bos":
        (reporter.say if context.token_id is not None else reporter.warn)(f"log p(y): each response {context.text}")
    elif unconditional is not None:
        reporter.say("log p(y): each response alone, its first token not scored")


def _size(arch: ModelArchitecture) -> str:
    if isinstance(arch, ForeignArchitecture):
        return f"about {num_parameters(arch):,} parameters"
    if arch.experts is None:
        return f"{num_parameters(arch):,} parameters"
    experts = f"{arch.experts.per_token} of {arch.experts.num_experts} experts"
    return f"{num_parameters(arch):,} parameters, of which {active_parameters(arch):,} are active for a token ({experts})"


def _where_it_starts(source: ModelSource, progress: Progress) -> str:
    return f"from {f'step {progress.step} of ' if progress.step else ''}{source.directory}"


def _held_out(run: Run) -> str:
    told = []
    for one in run.held_out_sets:
        count, name = len(one.batches.pairs), f" as {one.name}" if one.name else ""
        part = f", of which the first {one.num_pairs:,} are evaluated" if one.num_pairs < count else ""
        told.append(f"{count:,} held out{name}{part}")
    return "; ".join(told) or "none held out"


def describe_layout(groups: ProcessGroups, parallel: ParallelConfig) -> str:
    """How many ranks, what they share, and by which means."""
    switches = {
        "sequence parallel": parallel.sequence_parallel,
        "distributed optimizer": parallel.use_distributed_optimizer,
        "gradients reduced during the backward pass": parallel.overlap_grad_reduce,
        "weights gathered during the forward pass": parallel.overlap_param_gather,
    }
    if parallel.num_distributed_optimizer_instances > 1:
        switches[f"{parallel.num_distributed_optimizer_instances} instances of it"] = True
    context = f" x CP {groups.cp_size}" if groups.cp_size > 1 else ""
    sizes = f"TP {groups.tp_size} x PP {groups.pp_size}{context} x DP {groups.dp_size}"
    if parallel.expert_model_parallel_size > 1:
        sizes += f", experts over EP {parallel.expert_model_parallel_size} x TP {expert_tensor_size(parallel)}"
    ranks = f"{groups.world_size} rank{'s' * (groups.world_size > 1)} ({sizes})"
    return ", ".join([ranks, *(text for text, used in switches.items() if used)])


def describe_precision(model: ModelConfig, memory: MemoryConfig) -> str:
    """What is computed in, and what weights, gradients and moments are kept in."""
    if not model.bf16:
        return "fp32"
    layers = f"fp8 ({model.fp8_format}) layers, bf16 elsewhere" if model.fp8_format else "bf16"
    parts = [layers, f"{memory.main_params_dtype} master weights"]
    if memory.use_precision_aware_optimizer:
        parts += [f"{memory.main_grads_dtype} gradients", f"moments in {memory.exp_avg_dtype} and {memory.exp_avg_sq_dtype}"]
    if memory.optimizer_cpu_offload:
        parts.append(f"{memory.optimizer_offload_fraction:.0%} of the optimizer on the host")
    return ", ".join(parts)


def warn_of_few_pairs(num_held_out: int, eval_pairs: int | None, reporter: Reporter, name: str = "") -> None:
    """Warn where a run has held-out pairs, but so few that no figure of theirs will tell anything.

    Args:
        num_held_out: pairs of an evaluation; 0 for a run without.
        eval_pairs: of ``--eval-pairs``.
        reporter: of the run.
        name: of the held-out set, "" for the main one.
    """
    if 0 < num_held_out < FEWEST_PAIRS:
        flags = f"--eval-data {name}" if name else "--split and --valid-data-path"
        more = f"raise --eval-pairs {eval_pairs}" if num_held_out == eval_pairs else f"see {flags}"
        of_set = f" of {name}" if name else ""
        reporter.warn(
            f"held-out pairs{of_set}: {num_held_out}, not enough to tell anything by (an accuracy near one half has a standard "
            f"error of {0.5 / num_held_out**0.5:.2f}); hold out {FEWEST_PAIRS} or more: {more}"
        )


def build_throughput(config: Config, groups: ProcessGroups) -> Throughput:
    """What adds up the steps of the run."""
    peak = None
    if torch.cuda.is_available():
        peak = peak_flops(torch.cuda.get_device_name(), torch.bfloat16 if config.model.bf16 else torch.float32)
    return Throughput(groups.world_size, peak)


def stage_clock(policy: Policy) -> StageClock:
    """What Megatron's schedules tell when this rank's stage works."""
    clock = policy.config.timers = StageClock(on_device=torch.cuda.is_available())
    return clock


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
