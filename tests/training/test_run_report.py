"""What a run leaves for its report, and that a report which cannot be written fails no run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rmipo.config.schema import CheckpointConfig, Config
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.reports.page import report
from megatron_rmipo.training import main as trainer
from megatron_rmipo.training.run_report import _tell_report
from tests.harness import run_distributed
from tests.integration.data import write_pairs
from tests.integration.test_training import flags, output_of

STEPS = 2


def run_and_listen(arguments: list[str]) -> tuple[int, str]:
    return output_of(trainer.main, arguments)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.dist
def test_a_run_ends_with_its_report_on_the_last_line(tmp_path: Path) -> None:
    prefix = write_pairs(tmp_path / "data" / "pairs")
    arguments = flags(prefix, tmp_path / "run", train_iters=STEPS, eval_pairs=5, pipeline_model_parallel_size=2)
    (code, output), _ = run_distributed(run_and_listen, 2, arguments)
    assert code == 0
    logs = tmp_path / "run" / "logs"
    assert output.splitlines()[-1] == f"report: {logs / 'report.html'}"
    facts = json.loads((logs / "run.json").read_text())
    assert facts["train_iters"] == STEPS
    assert facts["layout"].startswith("2 ranks (TP 1 x PP 2 x DP 1)")
    assert [start["step"] for start in facts["starts"]] == [0]
    assert facts["data"]["held_out"]["evaluated"] == 5
    pairs, tokens = lines_of(logs / "held_out_pairs.jsonl"), lines_of(logs / "token_logps.jsonl")
    responses = [line for line in tokens if line["response"] != "prompt"]
    # Of five pairs three of the one kind and two of the other, each once.
    assert sorted({line["pair"] for line in tokens}) == [*range(5)]
    assert len(responses) == 10
    store = PairStore(prefix)
    first = len(store) - facts["data"]["held_out"]["pairs"]
    for line in responses:
        assert line["step"] == STEPS
        assert line["token_ids"] == getattr(store[first + line["pair"]], line["response"]).tolist()
        # What the last evaluation said of the response, by mean.
        mean = pairs[line["pair"]][f"logps/{line['response']}"]
        assert sum(line["logps"]) / len(line["logps"]) == pytest.approx(mean, rel=1e-4)
        assert len(line["alone"]) == len(line["logps"]) == len(line["token_ids"])
    text = (logs / "report.html").read_text()
    assert "Pair 0" in text
    assert "The tokenizer is no longer" not in text


def test_a_report_that_fails_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("none of yours")

    monkeypatch.setattr(report, "write_report", fail)
    _tell_report(Config(checkpoint=CheckpointConfig(save=str(tmp_path))))
    told = capsys.readouterr()
    assert told.out == ""
    assert "warning" in told.err
    assert "report was not written (ZeroDivisionError: none of yours)" in told.err
