"""Evaluations of a run: every held-out set, and what follows from what it says. All ranks call each function together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rmipo.command import progress_bar
from megatron_rmipo.passes.step_passes import PairMetrics
from megatron_rmipo.reports.metrics import summarize_held_out
from megatron_rmipo.reports.pictures.held_out import draw_held_out
from megatron_rmipo.runtime.agreement import on_first_rank
from megatron_rmipo.training.course.run import HeldOutBatches, Run
from megatron_rmipo.training.step import evaluate_batch


def begin(run: Run) -> None:
    """Bring what evaluations decide to where the run stands: its checkpoint was saved before the evaluation of its step."""
    selection = run.selection
    selection.look_back(on_first_rank(run.groups.world, run.reporter.evaluations))
    if selection.best is not None and not run.checkpoints.keep_best(selection.best):
        run.reporter.warn(
            f"the checkpoint of step {selection.best.step}, the best so far, is not in --save: the best anew is kept"
        )
        selection.forget_best()
    if selection.stops:
        run.reporter.say(selection.said())


def owes_evaluation(run: Run) -> bool:
    """Whether one is due before the next step: at the start, or that of the last step, which a signal cut short."""
    settings, step = run.config.training, run.progress.step
    if step == 0:
        return settings.eval_at_start
    is_due = bool(settings.eval_interval) and step % settings.eval_interval == 0
    if not (is_due or run.progress.consumed_pairs >= run.total_pairs):
        return False
    kinds = [held_out.kind for held_out in run.held_out_sets]
    return not on_first_rank(run.groups.world, lambda: all(run.reporter.has_record(kind, step) for kind in kinds))


def evaluate(run: Run) -> bool:
    """Mean metrics over each held-out set, logged; a checkpoint, where they are the best. Without such sets nothing is done.

    Returns:
        False where a signal cut it short, and nothing is logged.

    Raises:
        ConfigError: they have not the metric that is to be watched.
    """
    found: list[tuple[HeldOutBatches, list[PairMetrics]]] = []
    for held_out in run.held_out_sets:
        parts = _evaluated(run, held_out)
        if parts is None:
            return False
        found.append((held_out, parts))
    if not found:
        return True
    step = run.progress.step
    records = on_first_rank(run.groups.world, partial(_log_evaluation, run, found))
    is_best = run.selection.look_at(step, records) if step else []
    if "keep_best" in is_best:
        assert run.selection.best is not None
        run.heartbeat.doing("save")
        run.checkpoints.keep_best(run.selection.best)
    if run.selection.stops:
        run.reporter.say(run.selection.said())
    return True


def _evaluated(run: Run, held_out: HeldOutBatches) -> list[PairMetrics] | None:
    """What a set's pairs say, a batch each, on the first rank alone; None where a signal cut it short."""
    run.heartbeat.doing("evaluation")
    builder, end = held_out.batches, held_out.num_pairs
    mean_chosen_length = builder.pairs.mean_chosen_length(end)
    batch_size = run.config.training.global_batch_size
    parts = []
    title = f"evaluation at step {run.progress.step}" + (f" on {held_out.name}" if held_out.name else "")
    with progress_bar(title, end, "pair", shown=run.groups.rank == 0, stays=False) as bar:
        for first in range(0, end, batch_size):
            if run.stop.requested():
                return None
            # It may take long, and a checkpoint counts once it is looked after.
            run.checkpoints.look_after()
            indices = np.arange(first, min(first + batch_size, end))
            batch = builder.build(indices, mean_chosen_length=mean_chosen_length)
            with run.memory.explaining(title, builder, batch, run.state.optimizer):
                metrics = evaluate_batch(run.state, batch, run.objective, run.groups)
            # One rank tells of them; the others need not keep what may be millions of pairs.
            if run.groups.rank == 0:
                parts.append(metrics)
            bar.update(len(indices))
    return parts


def _log_evaluation(run: Run, found: Sequence[tuple[HeldOutBatches, list[PairMetrics]]]) -> dict[str, dict[str, Any]]:
    """On the first rank: log what all sets say. Kind -> record."""
    place = {"step": run.progress.step, "consumed_pairs": run.progress.consumed_pairs}
    values = {one.name: _joined(parts) for one, parts in found}
    records = {one.kind: {**place, **summarize_held_out(values[one.name], parts[0].distributions)} for one, parts in found}
    run.selection.check(records)
    for one, _ in found:
        _log_set(run, one, records[one.kind], values[one.name])
    return records


def _joined(parts: Sequence[PairMetrics]) -> dict[str, Tensor]:
    return {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values}


def _log_set(run: Run, held_out: HeldOutBatches, record: Mapping[str, float | int], values: Mapping[str, Tensor]) -> None:
    step = run.progress.step
    columns = {name: column.numpy() for name, column in values.items()}
    run.reporter.log(held_out.kind, record)
    run.reporter.log_pairs(step, columns, held_out.name)
    run.reporter.log_figure(f"{held_out.kind}/pairs", lambda: draw_held_out(f"{held_out.kind} at step {step}", columns), step)
    remark = run.objective.remark(values)
    if remark is not None:
        run.reporter.say(remark)
