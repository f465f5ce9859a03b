"""The training loop."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch

from megatron_rmipo.command import progress_bar
from megatron_rmipo.config.schema import Config
from megatron_rmipo.data.batches.batch_builder import BatchBuilder, RankBatch
from megatron_rmipo.data.batches.order import PairOrder
from megatron_rmipo.data.batches.read_ahead import iterate_batches
from megatron_rmipo.errors import RmipoError
from megatron_rmipo.health.heartbeat import Heartbeat
from megatron_rmipo.health.pace import Pace
from megatron_rmipo.memory.report import MemoryReport
from megatron_rmipo.model.attention.flex import num_fallbacks
from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.passes.expert_load import take_expert_load
from megatron_rmipo.passes.step_passes import PairMetrics
from megatron_rmipo.reports.metrics import summarize, summarize_held_out
from megatron_rmipo.reports.pipeline import pipeline_bubble
from megatron_rmipo.reports.profiler import StepProfiler
from megatron_rmipo.reports.reporter import Reporter
from megatron_rmipo.reports.throughput import Throughput
from megatron_rmipo.reports.timers import PhaseTimer, StageClock
from megatron_rmipo.runtime.agreement import on_first_rank
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.runtime.signals import StopRequest
from megatron_rmipo.training.outputs import RunCheckpoints
from megatron_rmipo.training.progress import Progress
from megatron_rmipo.training.setup import TrainingState
from megatron_rmipo.training.step import StepOutcome, evaluate_batch, train_step


@dataclasses.dataclass
class Run:
    """Everything the loop needs.

    Attributes:
        train_iters: the step after which the run is complete.
        total_pairs: pairs of the whole run.
        held_out: builder of evaluation batches, or None.
        num_held_out: pairs of an evaluation.
        checkpoints: of the run.
        stop: asked after each step and at each batch of an evaluation.
        clock: of this rank's pipeline stage.
        pace: compares this rank's with the others'.
        heartbeat: is told what this rank does.
    """

    config: Config
    groups: ProcessGroups
    state: TrainingState
    objective: Objective
    progress: Progress
    pairs: BatchBuilder
    order: PairOrder
    train_iters: int
    total_pairs: int
    held_out: BatchBuilder | None
    num_held_out: int
    reporter: Reporter
    throughput: Throughput
    profiler: StepProfiler
    memory: MemoryReport
    checkpoints: RunCheckpoints
    stop: StopRequest
    clock: StageClock
    pace: Pace
    heartbeat: Heartbeat


def train(run: Run) -> bool:
    """Train from where ``run.progress`` stands. All ranks call it together.

    Returns:
        Whether the run is complete; False where a signal or ``--exit-interval`` ended it before.

    Raises:
        RmipoError: more steps than ``--max-skipped-steps`` were not finite.
        OutOfMemoryError: on the rank whose memory ran out, alone.
    """
    settings = run.config.training
    saved_at = evaluated_at = run.progress.step
    with run.profiler, run.stop, run.checkpoints:
        if _owes_evaluation(run) and not evaluate(run):
            return False
        for batch, outcome, phases in _steps(run):
            step = run.progress.step
            run.checkpoints.look_after()
            if not outcome.updated:
                _count_skipped_step(run, batch, outcome)
            if step % run.config.logging.log_interval == 0 or step == run.train_iters:
                record, texts = _record(run, batch, outcome, phases)
                run.reporter.log("train", record, texts)
            if run.config.checkpoint.save_interval and step % run.config.checkpoint.save_interval == 0:
                run.heartbeat.doing("save")
                run.checkpoints.save()
                saved_at = step
            if settings.eval_interval and step % settings.eval_interval == 0:
                # One that a signal cuts short is owed.
                evaluated_at = step if evaluate(run) else evaluated_at
            if run.stop.requested() or (settings.exit_interval and step % settings.exit_interval == 0):
                break
        run.profiler.stop()
        # Saved before the last evaluation, and with signals still held off: neither may cost what was trained.
        run.heartbeat.doing("save")
        if saved_at != run.progress.step:
            run.checkpoints.save()
        run.checkpoints.wait()
        complete = run.progress.consumed_pairs >= run.total_pairs
        if complete and evaluated_at != run.progress.step:
            complete = evaluate(run)
    return complete


def _owes_evaluation(run: Run) -> bool:
    """Whether one is due before the next step: at the start, or that of the last step, which a signal cut short."""
    settings, step = run.config.training, run.progress.step
    if step == 0:
        return settings.eval_at_start
    is_due = bool(settings.eval_interval) and step % settings.eval_interval == 0
    if not (is_due or run.progress.consumed_pairs >= run.total_pairs):
        return False
    return not on_first_rank(run.groups.world, lambda: run.reporter.has_record("eval", step))


def evaluate(run: Run) -> bool:
    """Mean metrics over the held-out pairs, logged. All ranks call it together; without held-out pairs nothing is done.

    Returns:
        False where a signal cut it short, and nothing is logged.
    """
    if run.held_out is None:
        return True
    run.heartbeat.doing("evaluation")
    mean_chosen_length = run.held_out.pairs.mean_chosen_length(run.num_held_out)
    batch_size = run.config.training.global_batch_size
    parts = []
    title = f"evaluation at step {run.progress.step}"
    with progress_bar(title, run.num_held_out, "pair", shown=run.groups.rank == 0, stays=False) as bar:
        for first in range(0, run.num_held_out, batch_size):
            if run.stop.requested():
                return False
            # It may take long, and a checkpoint counts once it is looked after.
            run.checkpoints.look_after()
            indices = np.arange(first, min(first + batch_size, run.num_held_out))
            batch = run.held_out.build(indices, mean_chosen_length=mean_chosen_length)
            with run.memory.explaining(title, run.held_out, batch, run.state.optimizer):
                metrics = evaluate_batch(run.state, batch, run.objective, run.groups)
            # One rank tells of them; the others need not keep what may be millions of pairs.
            if run.groups.rank == 0:
                parts.append(metrics)
            bar.update(len(indices))
    on_first_rank(run.groups.world, partial(_log_evaluation, run, parts))
    return True


def _log_evaluation(run: Run, parts: Sequence[PairMetrics]) -> None:
    values = {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values}
    summary = summarize_held_out(values, parts[0].distributions)
    run.reporter.log("eval", {"step": run.progress.step, "consumed_pairs": run.progress.consumed_pairs, **summary})
    run.reporter.log_pairs(run.progress.step, {name: column.numpy() for name, column in values.items()})
    remark = run.objective.remark(values)
    if remark is not None:
        run.reporter.say(remark)


def _batches(run: Run) -> Iterator[RankBatch]:
    return iterate_batches(
        run.pairs,
        run.order,
        batch_size=run.config.training.global_batch_size,
        total_pairs=run.total_pairs,
        consumed_pairs=run.progress.consumed_pairs,
        num_workers=run.config.data.num_workers,
    )


def _steps(run: Run) -> Iterator[tuple[RankBatch, StepOutcome, dict[str, float]]]:
    """The steps from where ``run.progress`` stands to the end, timed with their wait for data; of each the seconds by phase."""
    batches, timer = _batches(run), PhaseTimer(told=run.heartbeat.doing)
    while run.progress.consumed_pairs < run.total_pairs:
        with run.profiler.step(run.progress.step + 1):
            started = time.perf_counter()
            run.heartbeat.enter(run.progress.step + 1, "data")
            with timer.phase("data"):
                batch = next(batches)
            run.clock.set_back()
            with run.memory.explaining(f"step {run.progress.step + 1}", run.pairs, batch, run.state.optimizer):
                outcome = train_step(run.state, batch, run.objective, run.groups, timer)
            phases = timer.take()
            run.throughput.add(batch, time.perf_counter() - started, phases)
        run.progress.step += 1
        run.progress.consumed_pairs += batch.num_pairs
        yield batch, outcome, phases


def _record(
    run: Run, batch: RankBatch, outcome: StepOutcome, phases: dict[str, float]
) -> tuple[dict[str, float | int], dict[str, str]]:
    """What is shown of a step: numbers, means over its global batch, and texts."""
    metrics: PairMetrics = outcome.metrics
    straggler, texts = run.pace.compare(phases["data"] + run.clock.busy_seconds, sum(phases.values()))
    return {
        "step": run.progress.step,
        "consumed_pairs": run.progress.consumed_pairs,
        "lr": outcome.learning_rate,
        "grad_norm": outcome.grad_norm,
        "skipped_steps": run.progress.skipped_steps,
        **summarize(metrics.values, metrics.distributions),
        **take_expert_load(run.state.policy, run.groups, each=run.config.logging.log_expert_load),
        **run.throughput.take(),
        **straggler,
        # The host's clock says nothing of a GPU that stands still.
        **pipeline_bubble(batch, run.pairs.layout.stages, None if run.clock.on_device else run.clock, phases, run.groups),
        **({"flex_fallbacks": num_fallbacks()} if num_fallbacks() else {}),
    }, texts


def _count_skipped_step(run: Run, batch: RankBatch, outcome: StepOutcome) -> None:
    run.progress.skipped_steps += 1
    indices = [int(batch.pair_indices[number]) for number in outcome.offending_pairs]
    named = ", ".join(run.pairs.pairs.describe(index) for index in indices[:5]) + (", ..." if len(indices) > 5 else "")
    cause = (
        f"the loss of {len(indices)} pairs is not finite ({named})" if indices else f"the gradient norm is {outcome.grad_norm}"
    )
    run.reporter.warn(f"step {run.progress.step} skipped, weights unchanged: {cause}")
    if run.progress.skipped_steps > run.config.training.max_skipped_steps:
        run.checkpoints.wait()
        raise RmipoError(
            f"{run.progress.skipped_steps} steps were skipped because a loss or gradient was not finite, more than "
            f"--max-skipped-steps {run.config.training.max_skipped_steps}. Last: {cause}. Lower --lr, or look at these "
            "pairs with tools/inspect_pairs.py."
        )
