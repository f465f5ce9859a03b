"""What of a training step's CPU time is neither the model's nor the optimizer's."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

from megatron.core.pipeline_parallel import schedules

from megatron_rmipo.training import step as training_step
from megatron_rmipo.training.setup import TrainingState


def overhead_share(step: Callable[[], Any], state: TrainingState) -> float:
    """Share of one step's CPU seconds in which it lays out the batch, runs the schedule, makes losses and gathers metrics.

    The rest is the model's forward and backward, the reduction of gradients, and the optimizer's update.

    Args:
        step: one training step of ``state``, without pipeline parallelism.
        state: model and optimizer.
    """
    within = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal within
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                within += time.process_time() - started

        return call

    config = state.policy.config
    theirs = [
        (state.model.chunks[0], "forward"),
        (schedules, "backward_step"),
        (config, "finalize_model_grads_func"),
        (state.model, "zero_grad_buffer"),
        (training_step, "_update"),
    ]
    with contextlib.ExitStack() as patches:
        for owner, name in theirs:
            patches.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name))))
        started = time.process_time()
        step()
        return 1 - within / (time.process_time() - started)
