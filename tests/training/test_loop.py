"""What an evaluation shows, with a stand-in for the model's pass."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rmipo.config.schema import Config
from megatron_rmipo.objectives.rmipo import Rmipo, RmipoConfig
from megatron_rmipo.passes.step_passes import PairMetrics
from megatron_rmipo.reports.reporter import Reporter
from megatron_rmipo.training import loop
from megatron_rmipo.training.progress import Progress
from tests.objectives.pairs import make_pairs


@pytest.mark.parametrize(("preset", "said"), [("paper", True), ("per_token", False)])
def test_an_evaluation_ends_with_what_the_objective_remarks(
    preset: Any, said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = Rmipo(RmipoConfig(preset=preset))
    # 100 tokens each: dpmi is 40 nats in sum, 0.4 a token.
    pairs = make_pairs([-100.0] * 5, [-100.0] * 5, ([100] * 5, [100] * 5), ([-140.0] * 5, [-100.0] * 5))
    output = objective(pairs)
    metrics = PairMetrics({"loss": output.losses, **output.metrics}, output.distributions)
    monkeypatch.setattr(loop, "evaluate_batch", lambda *_: metrics)
    stream = io.StringIO()
    with Reporter(tmp_path, total_steps=7, config={}, stream=stream) as reporter:
        run: Any = SimpleNamespace(
            config=Config(),
            groups=None,
            state=SimpleNamespace(optimizer=None),
            objective=objective,
            progress=Progress(step=3, consumed_pairs=12),
            held_out=SimpleNamespace(
                pairs=SimpleNamespace(mean_chosen_length=lambda _end: 100.0), build=lambda _indices, mean_chosen_length: None
            ),
            num_held_out=5,
            reporter=reporter,
            memory=SimpleNamespace(explaining=lambda *_: contextlib.nullcontext()),
            stop=SimpleNamespace(requested=lambda: False),
        )
        loop.evaluate(run)
    (record,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (record["gamma/at_min"], record["gamma/at_max"]) == (float(said), 0.0)
    start = "target margins: of 5 pairs with dpmi > 0, 5 have"
    remarks = [line for line in stream.getvalue().splitlines() if line.startswith(start)]
    assert len(remarks) == said
