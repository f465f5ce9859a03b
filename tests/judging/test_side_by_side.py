"""Evaluations beside each other, from files of our own form and of lm-eval's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rmipo.errors import DataError
from megatron_rmipo.evaluation_file import Evaluation, EvaluationTable, read_evaluation, write_evaluation
from megatron_rmipo.judging.compare_cli import main


def write(path: Path, name: str, accuracy: float, *, title: str = "Pairs") -> Path:
    rows = [["all | of", 9, accuracy, 0.1, None], ["hard", 4, accuracy - 0.25, None, 3.5]]
    table = EvaluationTable(title, ["subset", "n", "accuracy", "+-", "margin"], rows, "A note.")
    write_evaluation(path, Evaluation("evaluate_pairs", "Pairs", name, [table], {"seed": 3}))
    return path


def write_lm_eval(folder: Path, value: float, time: str = "2026-01-02") -> None:
    metrics = {"alias": " - mini", "acc,none": value, "acc_stderr,none": 0.2, "em,strict": 1, "em_stderr,strict": "N/A"}
    found = {"results": {"mini": metrics}, "configs": {}, "n-samples": {"mini": {"effective": 5}}, "model_name": "m"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"results_{time}.json").write_text(json.dumps({**found, "lm_eval_version": "0.4.13", "chat_template": "x"}))


def test_numbers_of_the_same_place_are_put_beside_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "model" / "pairs.json", "new", 0.75)
    write(tmp_path / "base.json", "old", 0.5)
    write_lm_eval(tmp_path / "model" / "lm" / "x", 0.1, "2026-01-01")
    write_lm_eval(tmp_path / "model" / "lm" / "x", 0.75)
    write_lm_eval(tmp_path / "lm_base", 0.5)
    (tmp_path / "model" / "notes.json").write_text("[]")
    flags = ["--model", str(tmp_path / "model"), "--base", str(tmp_path / "base.json"), str(tmp_path / "lm_base")]
    assert main([*flags, "--output", str(tmp_path / "both.v1")]) == 0
    text = (tmp_path / "both.v1.md").read_text()
    assert capsys.readouterr().out == text
    evaluation = read_evaluation(tmp_path / "both.v1.json")
    # lm-eval's newest results count.
    lm_eval, pairs = evaluation.tables
    assert lm_eval.columns == ["task", "metric", "measure", "model", "+-", "base", "+-", "change"]
    assert lm_eval.rows == [
        ["- mini", "acc", "value", 0.75, 0.2, 0.5, 0.2, 0.25],
        ["- mini", "em (strict)", "value", 1.0, None, 1.0, None, 0.0],
    ]
    assert "with the model's chat template" in lm_eval.note
    assert pairs.rows == [
        ["all | of", "accuracy", 0.75, 0.1, 0.5, 0.1, 0.25],
        ["all | of", "margin", None, None, None, None, None],
        ["hard", "accuracy", 0.5, None, 0.25, None, 0.25],
        ["hard", "margin", 3.5, None, 3.5, None, 0.0],
    ]
    assert "| all \\| of | accuracy | 0.75 +- 0.1 |" in text
    assert "A note." in text


def test_rows_alike_keep_their_numbers_and_details_stay_off_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, shift in (("model", 0.5), ("base", 0.25)):
        rows = [["task", 3, 0.125 + shift], ["task", 3, 0.25 + shift]]
        tables = [
            EvaluationTable("Alike", ["task", "pairs", "score"], rows),
            EvaluationTable("Long", ["task", "score"], [["a", shift]], is_detail=True),
        ]
        write_evaluation(tmp_path / f"{name}.json", Evaluation("evaluate_pairs", "Pairs", name, tables))
    flags = ["--model", str(tmp_path / "model.json"), "--base", str(tmp_path / "base.json"), "--output", str(tmp_path / "both")]
    assert main(flags) == 0
    alike, long = read_evaluation(tmp_path / "both.json").tables
    assert alike.rows == [
        ["task", "score", 0.625, None, 0.375, None, 0.25],
        ["task", "score", 0.75, None, 0.5, None, 0.25],
    ]
    assert (long.is_detail, long.rows[0][-1]) == (True, 0.25)
    assert "Long" not in capsys.readouterr().out
    assert "Long" in (tmp_path / "both.md").read_text()


def test_without_a_base_the_tables_are_those_of_the_model(tmp_path: Path) -> None:
    write_lm_eval(tmp_path / "raw", 0.5)
    assert main(["--model", str(tmp_path / "raw"), "--output", str(tmp_path / "lm_eval")]) == 0
    evaluation = read_evaluation(tmp_path / "lm_eval.json")
    assert (evaluation.kind, evaluation.model, evaluation.tables[0].columns[-1]) == ("lm_eval", "m", "n")
    assert evaluation.tables[0].rows[0] == ["- mini", "acc", 0.5, 0.2, 5]


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, base = write(tmp_path / "a.json", "new", 0.75), write(tmp_path / "b.json", "old", 0.5, title="Other")
    output = ["--output", str(tmp_path / "both")]
    (tmp_path / "empty").mkdir()
    for flags, said in (
        (["--model", str(model), "--base", str(base)], "no table of one is in the other"),
        (["--model", str(tmp_path / "none.json")], "not a readable evaluation"),
        (["--model", str(tmp_path / "empty")], "no evaluation is there"),
    ):
        assert main([*flags, *output]) == 1
        assert said in capsys.readouterr().err
    found: dict[str, Any] = json.loads(model.read_text())
    found["tables"][0]["rows"][0].pop()
    model.write_text(json.dumps(found))
    with pytest.raises(DataError, match="more or fewer cells"):
        read_evaluation(model)
    model.write_text("{}")
    with pytest.raises(DataError, match="not an evaluation"):
        read_evaluation(model)
