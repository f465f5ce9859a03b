"""The commands that a report ends with: each is understood by the program that it starts."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from megatron_rmipo.checkpoint.megatron_to_hf_cli import build_parser as build_export
from megatron_rmipo.config.schema import ModelConfig
from megatron_rmipo.evaluation import cli as evaluation
from megatron_rmipo.objectives.arguments import parse_arguments, parse_fields_and_objective
from megatron_rmipo.reports.page.cli import build_parser as build_report
from megatron_rmipo.reports.page.next_commands import next_commands
from megatron_rmipo.reports.page.run_files import read_page_run
from megatron_rmipo.reports.summary_cli import build_parser as build_summary
from tests.examples.scripts import ROOT
from tests.reports.page.runs import write_page_run

STARTED = {"starts": [{"time": "", "step": 0, "command": "torchrun --nproc-per-node 8 -m megatron_rmipo.train --lr 1"}]}


@pytest.mark.parametrize("exported", [True, False])
@pytest.mark.parametrize("train_iters", [30, 99])
def test_commands_fit_the_run_and_parse(train_iters: int, exported: bool, tmp_path: Path) -> None:
    model = tmp_path / "a model"  # with a space
    if exported:
        model.mkdir()
    flags = [
        "--valid-data-path",
        "data/valid",
        "--eval-data",
        "chat=data/chat",
        "--save-hf",
        str(model),
        "--load-hf",
        "models/base",
    ]
    logs = write_page_run(tmp_path / "run", flags=flags, facts={**STARTED, "train_iters": train_iters})
    found = next_commands(read_page_run(logs))
    commands = {command.title.split()[0]: shlex.split(command.text) for command in found}
    trains = commands["Go" if train_iters > 30 else "Train"]
    assert ("Go" in commands, "Train" in commands) == (train_iters > 30, train_iters == 30)
    assert trains[:5] == ["torchrun", "--nproc-per-node", "8", "-m", "megatron_rmipo.train"]
    config = parse_arguments(trains[5:])
    assert config.checkpoint.load == str(tmp_path / "run")
    assert config.checkpoint.finetune == (train_iters == 30)
    assert (config.checkpoint.save == config.checkpoint.load) == (train_iters > 30)
    assert ("Export" in commands) != exported
    if not exported:
        assert build_export().parse_args(commands["Export"][2:]).save_hf == model
    build_summary().parse_args(commands["Summarize"][2:])
    build_report().parse_args(commands["This"][2:])
    (judge_free,) = (words for words in (shlex.split(command.text) for command in found) if "tools/evaluate_pairs.py" in words)
    sections, objective = parse_fields_and_objective(judge_free[2:], evaluation._FIELDS, "evaluate_pairs.py", "")
    plan = evaluation.plan_of(sections[evaluation.EvaluationConfig], sections[ModelConfig], objective)
    assert [source.name for source in plan.sources] == ["held-out", "chat"]
    assert f"pretrained={model}" in commands["Evaluate"]
    script, *models = commands["Put"][1:]
    assert (ROOT / script).is_file()
    assert models == [str(model), "models/base"]
