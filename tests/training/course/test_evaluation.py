"""What an evaluation shows and who writes it down, with a stand-in for the model's pass."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rmipo.config.flags.evaluation import EvaluationConfig
from megatron_rmipo.config.schema import Config
from megatron_rmipo.errors import ConfigError, RmipoError
from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.objectives.rmipo import Rmipo, RmipoConfig
from megatron_rmipo.passes.step_passes import PairMetrics
from megatron_rmipo.reports.reporter import Reporter
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime
from megatron_rmipo.training.course import evaluation
from megatron_rmipo.training.course.run import HeldOutBatches
from megatron_rmipo.training.course.selection import Selection
from megatron_rmipo.training.observers import open_reporter
from megatron_rmipo.training.progress import Progress
from tests.harness import run_distributed
from tests.objectives.pairs import make_pairs


def run_with(reporter: Reporter, objective: Objective, groups: Any, names: tuple[str, ...] = ("",)) -> Any:
    """As much of a run as an evaluation of five pairs needs."""
    pairs = SimpleNamespace(mean_chosen_length=lambda _end: 100.0)
    batches: Any = SimpleNamespace(pairs=pairs, build=lambda _indices, mean_chosen_length: None)
    progress = Progress(step=3, consumed_pairs=12)
    return SimpleNamespace(
        config=Config(),
        groups=groups,
        state=SimpleNamespace(optimizer=None),
        objective=objective,
        progress=progress,
        held_out_sets=[HeldOutBatches(name, batches, 5) for name in names],
        selection=Selection(EvaluationConfig(), progress),
        reporter=reporter,
        memory=SimpleNamespace(explaining=lambda *_: contextlib.nullcontext()),
        checkpoints=SimpleNamespace(look_after=lambda: None),
        stop=SimpleNamespace(requested=lambda: False),
        heartbeat=SimpleNamespace(doing=lambda _what: None),
    )


@pytest.mark.parametrize(("preset", "said"), [("paper", True), ("per_token", False)])
def test_an_evaluation_ends_with_what_the_objective_remarks(
    preset: Any, said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = Rmipo(RmipoConfig(preset=preset))
    # 100 tokens each: dpmi is 40 nats in sum, 0.4 a token.
    pairs = make_pairs([-100.0] * 5, [-100.0] * 5, ([100] * 5, [100] * 5), ([-140.0] * 5, [-100.0] * 5))
    output = objective(pairs)
    metrics = PairMetrics({"loss": output.losses.detach(), **output.metrics}, output.distributions)
    monkeypatch.setattr(evaluation, "evaluate_batch", lambda *_: metrics)
    monkeypatch.setattr(evaluation, "on_first_rank", lambda _group, action: action())
    stream = io.StringIO()
    with Reporter(tmp_path, total_steps=7, stream=stream) as reporter:
        assert evaluation.evaluate(run_with(reporter, objective, SimpleNamespace(rank=0, world=None)))
    (record,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (record["gamma/at_min"], record["gamma/at_max"]) == (float(said), 0.0)
    start = "target margins: of 5 pairs with dpmi > 0, 5 have"
    remarks = [line for line in stream.getvalue().splitlines() if line.startswith(start)]
    assert len(remarks) == said


def faults_of_the_first_rank(folder: str) -> list[str]:
    """What this rank raises where the first one cannot open its log directory, and where it cannot write an evaluation."""
    groups = initialize_runtime()
    config, log_dir = Config(), Path(folder) / "logs"
    blocked = dataclasses.replace(config, logging=dataclasses.replace(config.logging, log_dir=str(Path(folder) / "file")))
    working = dataclasses.replace(config, logging=dataclasses.replace(config.logging, log_dir=str(log_dir)))
    with pytest.raises(ConfigError) as not_opened:
        open_reporter(blocked, groups, 7, Progress())
    evaluation.evaluate_batch = lambda *_: PairMetrics({"loss": torch.zeros(5)})
    with open_reporter(working, groups, 7, Progress()) as reporter:
        run = run_with(reporter, Rmipo(RmipoConfig()), groups)
        assert evaluation.evaluate(run)
        dist.barrier()
        if groups.rank == 0:
            (log_dir / "held_out_pairs.jsonl").unlink()
            (log_dir / "held_out_pairs.jsonl").mkdir()
        with pytest.raises(RmipoError) as not_written:
            evaluation.evaluate(run)
    shutdown_runtime()
    return [str(not_opened.value), str(not_written.value)]


@pytest.mark.dist
def test_what_the_first_rank_alone_cannot_write_all_raise(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    first, second = run_distributed(faults_of_the_first_rank, 2, str(tmp_path))
    assert first == second
    opened, written = first
    assert str(tmp_path / "file") in opened
    assert f"{tmp_path}/logs/held_out_pairs.jsonl: cannot be written: " in written
