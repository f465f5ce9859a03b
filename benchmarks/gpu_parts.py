"""A gradient pass in its parts: forward, backward, and of both the output layer's with the log-probs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu_steps import WaitingTimer
from megatron_rmipo.data.batches.batch_builder import RankBatch
from megatron_rmipo.model.policy import PolicyModel
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.runtime.groups import ProcessGroups
from megatron_rmipo.training.setup import TrainingState
from megatron_rmipo.training.step import train_step

PARTS = ("forward", "backward", "head_forward", "head_backward", "communication")


class Spans:
    """Pieces of the device's work, each from one mark to another, by name."""

    def __init__(self) -> None:
        self._marks: dict[str, list[Any]] = {}

    def mark(self, name: str) -> None:
        """A piece of this name begins, or the one that began last ends. The device is not waited for."""
        mark: Any = time.perf_counter()
        if torch.cuda.is_available():
            mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            mark.record()
        self._marks.setdefault(name, []).append(mark)

    def count(self, name: str) -> int:
        """How many pieces there were."""
        return len(self._marks.get(name, [])) // 2

    def seconds(self, name: str) -> float:
        """Of all pieces, the device's work done."""
        marks = self._marks.get(name, [])
        pieces = zip(marks[::2], marks[1::2], strict=True)
        return float(sum(last - first if isinstance(first, float) else first.elapsed_time(last) / 1e3 for first, last in pieces))


@contextlib.contextmanager
def watched(policy: PolicyModel) -> Iterator[Spans]:
    """Spans ``forward``, ``head_forward`` and ``head_backward`` of every row that has a backward pass."""
    spans = Spans()

    def on_forward(*_: Any) -> None:
        if torch.is_grad_enabled():
            spans.mark("forward")

    def on_head(_module: Any, _inputs: Any) -> None:
        if torch.is_grad_enabled():
            spans.mark("head_forward")

    def after_head(_module: Any, inputs: Any, logprobs: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            spans.mark("head_forward")
            # Called when the gradient of the log-probs has come, and when that of the hidden states has been made.
            for tensor in (logprobs, inputs[0]):
                tensor.register_hook(lambda _: spans.mark("head_backward"))

    head = policy.output_layer
    handles = [policy.register_forward_pre_hook(on_forward), policy.register_forward_hook(on_forward)]
    handles += [head.register_forward_pre_hook(on_head), head.register_forward_hook(after_head)]
    try:
        yield spans
    finally:
        for handle in handles:
            handle.remove()


def gradient_parts(state: TrainingState, batch: RankBatch, objective_name: str, groups: ProcessGroups) -> dict[str, float]:
    """Seconds of each of ``PARTS`` in a step of its own, whose marks disturb no other figure.

    Backward is the gradient pass less forward and exposed communication: losses and the sum of gradients are in it. One rank
    talks to nobody.
    """
    assert groups.world_size == 1, "communication is not told apart"
    timer, communication = WaitingTimer(), 0.0
    with watched(state.policy[0]) as spans:
        train_step(state, batch, build_objective(objective_name, {}), groups, timer)
    forward = spans.seconds("forward")
    seconds = {"forward": forward, "backward": timer.take()["gradient"] - forward - communication}
    return seconds | {name: spans.seconds(name) for name in ("head_forward", "head_backward")} | {"communication": communication}
