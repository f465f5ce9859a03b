"""The script that evaluates a model and the one it was made from: its commands, and a whole run with lm-eval."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rmipo.checkpoint.convert import convert_hf_to_megatron, convert_megatron_to_hf
from megatron_rmipo.evaluation_file import read_evaluation
from megatron_rmipo.generation.cli import build_parser
from megatron_rmipo.judging import compare_cli
from tests.examples.scripts import ROOT, calls, environment, run_script
from tests.generation.models import save_chat_model, write_questions

SCRIPT = "evaluate.sh"
SETS = {"PAIRS": "hh=/d/hh uf=/d/uf", "BENCHMARKS": "mt_bench=/d/q.jsonl jsonl=/d/own"}


def commands(output: str, program: str) -> list[list[str]]:
    """The words behind a program of the printed commands that start it."""
    lines = [shlex.split(line) for line in output.splitlines() if not line.startswith("==")]
    return [line[number + 1 :] for line in lines for number, word in enumerate(line[:2]) if word.endswith(program)]


def test_a_dry_run_prints_commands_that_parse_and_does_nothing(tmp_path: Path) -> None:
    variables = {**SETS, "DRY_RUN": "1", "LIMIT": "2", "GENERATE_FLAGS": "--preset llama3", "INCLUDE_PATH": "/d/tasks"}
    output = run_script(SCRIPT, environment(tmp_path, **variables), "/m/new", "/m/old")
    assert calls(tmp_path) == []
    assert not (tmp_path / "work").exists()
    evaluated = commands(output, "lm_eval")
    assert [line[line.index("--model_args") + 1].split(",")[0] for line in evaluated] == [
        "pretrained=/m/new",
        "pretrained=/m/old",
    ]
    assert all("--tasks leaderboard" in " ".join(line) and "--apply_chat_template" in line for line in evaluated)
    assert all("--include_path /d/tasks --limit 2" in " ".join(line) for line in evaluated)
    base, model = commands(output, "evaluate_pairs.py")
    assert base[: base.index("--output")] == ["--load-hf", "/m/old", "--data", "hh=/d/hh", "uf=/d/uf"]
    assert model[model.index("--compare") + 1] == base[base.index("--pairs") + 1]
    generated = [build_parser().parse_args(line) for line in commands(output, "generate_answers.py")]
    made = [(one.model, one.benchmark) for one in generated if not one.print_judge_commands]
    assert made == [
        ([f"{name}=/m/{place}"], benchmark)
        for benchmark in ("mt_bench", "jsonl")
        for name, place in (("model", "new"), ("base", "old"))
    ]
    assert {(one.preset, one.limit) for one in generated if not one.print_judge_commands} == {("llama3", 2)}
    *_, last = commands(output, "compare_evaluations.py")
    compared = compare_cli.build_parser().parse_args(last)
    assert [path.name for path in compared.model] == [path.name.replace("base", "model") for path in compared.base]
    assert len(compared.model) == 4


def test_stages_can_be_chosen_and_others_are_refused(tmp_path: Path) -> None:
    dry = {**SETS, "DRY_RUN": "1", "APPLY_CHAT_TEMPLATE": "0", "MODEL_NAME": "rmipo"}
    output = run_script(SCRIPT, environment(tmp_path, **dry, ONLY="pairs"), "/m/new", "/m/old")
    assert [line[2] for line in map(str.split, output.splitlines()) if line[:2] == ["==", "pairs"]] == ["base", "rmipo"]
    assert "lm_eval run" not in output
    output = run_script(SCRIPT, environment(tmp_path, **dry, ONLY="lm_eval"), "/m/new", "/m/old")
    assert "--apply_chat_template" not in output
    for variables, models, said in (
        ({"ONLY": "judge"}, ("a", "b"), "there is no stage judge; there are: lm_eval pairs generate"),
        ({"ONLY": "pairs", "PAIRS": ""}, ("a", "b"), "nothing to evaluate"),
        ({"BASE_NAME": "rmipo"}, ("a", "b"), "are both rmipo"),
        ({}, ("a",), "give two Hugging Face model directories"),
    ):
        assert said in run_script(SCRIPT, environment(tmp_path, **{**dry, **variables}), *models, expect=1)
    (tmp_path / "config.json").touch()
    for models, said in (
        ((str(tmp_path / "work"), "b"), f"MODEL={tmp_path / 'work'}: no config.json there"),
        ((str(tmp_path), "owner/name"), "start again with models/name as BASE"),
    ):
        assert said in run_script(SCRIPT, environment(tmp_path), *models, expect=1)


@pytest.mark.slow
def test_lm_eval_and_answers_of_an_exported_model_beside_its_base(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    base = save_chat_model(tmp_path / "base")
    trained = save_chat_model(tmp_path / "trained", initializer_range=0.3)
    convert_hf_to_megatron(trained, tmp_path / "checkpoint")
    convert_megatron_to_hf(tmp_path / "checkpoint", tmp_path / "exported")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [{"question": f"What is {n} + 1?", "choices": [" one", " two", " the sea"], "label": n % 3} for n in range(7)]
    (tasks / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "sums.yaml").write_text(
        f"task: sums\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tasks / 'sums.jsonl'}}}}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{label}}"\ndoc_to_choice: "{{choices}}"\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\nmetadata: {version: 1.0}\n"
    )
    questions = write_questions(tmp_path / "own.jsonl", "jsonl")
    variables = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "WORK_DIR": str(tmp_path / "work"),
        "TASKS": "sums", "INCLUDE_PATH": str(tasks), "BENCHMARKS": f"jsonl={questions}", "GENERATE_FLAGS": "--max-tokens 4",
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "DTYPE": "float32",
    }  # fmt: skip
    command = ["bash", str(ROOT / "examples" / SCRIPT), str(tmp_path / "exported"), str(base)]
    for start in ("first", "second"):
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("lm_eval model: already there" in done.stdout) == (start == "second")
    lengths, *others = read_evaluation(tmp_path / "work" / "side_by_side.json").tables[::-1]
    assert lengths.title == "Lengths of answers to jsonl"
    (sums,) = others
    (row,) = sums.rows
    assert row[:3] == ["sums", "acc", "value"]
    found = [read_evaluation(tmp_path / "work" / name / "lm_eval.json") for name in ("model", "base")]
    assert [one.kind for one in found] == ["lm_eval", "lm_eval"]
    assert [row[3], row[5]] == [one.tables[0].rows[0][2] for one in found]
    assert all(one.tables[0].rows[0][4] == 7 for one in found)
    assert "| sums" in done.stdout
    assert "tools/judge_pairwise.py --answers" in done.stdout
