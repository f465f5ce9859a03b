"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator

from megatron_rmipo.data.batches.batch_builder import RankBatch
from megatron_rmipo.data.batches.read_ahead import iterate_batches
from megatron_rmipo.errors import RmipoError
from megatron_rmipo.model.attention.flex import num_fallbacks
from megatron_rmipo.passes.expert_load import take_expert_load
from megatron_rmipo.passes.step_passes import PairMetrics
from megatron_rmipo.reports.metrics import summarize
from megatron_rmipo.reports.pipeline import pipeline_bubble
from megatron_rmipo.reports.timers import PhaseTimer
from megatron_rmipo.training.course.evaluation import begin, evaluate, owes_evaluation
from megatron_rmipo.training.course.run import Run
from megatron_rmipo.training.course.samples import sample
from megatron_rmipo.training.step import StepOutcome, train_step


def train(run: Run) -> bool:
    """Train from where ``run.progress`` stands. All ranks call it together.

    Returns:
        Whether the run is complete, or over by ``--early-stop``; False where a signal or ``--exit-interval`` ended it before.

    Raises:
        RmipoError: more steps than ``--max-skipped-steps`` were not finite.
        OutOfMemoryError: on the rank whose memory ran out, alone.
    """
    settings = run.config.training
    evaluated_at = run.progress.step
    with run.profiler, run.stop, run.checkpoints:
        begin(run)
        if owes_evaluation(run) and not evaluate(run):
            return False
        if not sample(run):
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
            if settings.eval_interval and step % settings.eval_interval == 0:
                # One that a signal cuts short is owed.
                evaluated_at = step if evaluate(run) else evaluated_at
            sample(run)
            if run.stop.requested() or (settings.exit_interval and step % settings.exit_interval == 0):
                break
        run.profiler.stop()
        # Saved before the last evaluation, and with signals still held off: neither may cost what was trained.
        run.heartbeat.doing("save")
        if run.checkpoints.saved_step != run.progress.step:
            run.checkpoints.save()
        run.checkpoints.wait()
        complete = run.progress.consumed_pairs >= run.total_pairs or run.selection.stops
        if complete and evaluated_at != run.progress.step:
            complete = evaluate(run)
        complete = complete and sample(run, at_end=True)
    return complete


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
    """The steps from where ``run.progress`` stands to the end, timed with their wait for data; of each the seconds by phase.

    The end is where an evaluation says so, too.
    """
    batches, timer = _batches(run), PhaseTimer(told=run.heartbeat.doing)
    while run.progress.consumed_pairs < run.total_pairs and not run.selection.stops:
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
