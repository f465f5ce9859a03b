"""What a run is made of, once its ranks are connected and its model is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from megatron_rmipo.config.schema import Config
from megatron_rmipo.data.batches.batch_builder import BatchBuilder
from megatron_rmipo.data.batches.order import PairOrder
from megatron_rmipo.health.heartbeat import Heartbeat
from megatron_rmipo.health.pace import Pace
from megatron_rmipo.memory.report import MemoryReport
from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.reports.profiler import StepProfiler
from megatron_rmipo.reports.reporter import Reporter, evaluation_kind
from megatron_rmipo.reports.throughput import Throughput
from megatron_rmipo.reports.timers import StageClock
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.runtime.signals import StopRequest
from megatron_rmipo.training.course.prompts import Prompts
from megatron_rmipo.training.course.selection import Selection
from megatron_rmipo.training.outputs import RunCheckpoints
from megatron_rmipo.training.progress import Progress
from megatron_rmipo.training.setup import TrainingState


@dataclasses.dataclass(frozen=True)
class HeldOutBatches:
    """A held-out set as it is evaluated.

    Attributes:
        name: "" for the main one.
        batches: builder of its batches.
        num_pairs: how many pairs are evaluated, the first ones.
    """

    name: str
    batches: BatchBuilder
    num_pairs: int

    @property
    def kind(self) -> str:
        """Of its records in metrics.jsonl."""
        return evaluation_kind(self.name)


@dataclasses.dataclass
class Run:
    """Everything the loop needs.

    Attributes:
        train_iters: the step after which the run is complete.
        total_pairs: pairs of the whole run.
        held_out_sets: all that an evaluation evaluates, the main one first where there is one.
        selection: what evaluations decide.
        checkpoints: of the run.
        stop: asked after each step and at each batch of an evaluation.
        clock: of this rank's pipeline stage.
        pace: compares this rank's with the others'.
        heartbeat: is told what this rank does.
        assets: directory of the model's Hugging Face config and tokenizer.
        prompts: that are answered between steps, or None.
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
    held_out_sets: Sequence[HeldOutBatches]
    selection: Selection
    reporter: Reporter
    throughput: Throughput
    profiler: StepProfiler
    memory: MemoryReport
    checkpoints: RunCheckpoints
    stop: StopRequest
    clock: StageClock
    pace: Pace
    heartbeat: Heartbeat
    assets: Path
    prompts: Prompts | None
