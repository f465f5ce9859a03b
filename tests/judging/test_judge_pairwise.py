"""The command that has a judge compare two files of answers: results, costs, faults, going on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_rmipo.evaluation_file import read_evaluation
from megatron_rmipo.generation.answer_files import write_answers
from megatron_rmipo.generation.questions import read_questions
from megatron_rmipo.judging import cli
from tests.generation.models import write_questions
from tests.judging.servers import Judge, prefer_longer, running

ROOT = Path(__file__).parent.parent.parent
FAST = ("--timeout", "5", "--num-retries", "0")


def write_both(tmp_path: Path, benchmark: str, lengths: list[tuple[int, int]]) -> list[str]:
    """Two files of answers of these lengths; the flags that name them."""
    questions = read_questions(write_questions(tmp_path / "questions", benchmark), benchmark)
    for column, name in enumerate(("ours", "theirs")):
        turns = {one.key: ["x" * lengths[n][column] for _ in one.asked] for n, one in enumerate(questions)}
        write_answers(tmp_path / name, benchmark, name, questions, turns)
    return ["--answers", str(tmp_path / "ours"), "--baseline", str(tmp_path / "theirs")]


def judge(tmp_path: Path, server: Judge, *flags: str, output: str = "judged.json") -> int:
    given = ["--base-url", server.url, "--judge-model", "j", "--output", str(tmp_path / output), *FAST]
    return cli.main([*given, *flags])


def test_both_orders_are_judged_and_told_by_category(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret-key")
    files = write_both(tmp_path, "alpaca_eval", [(9, 4), (3, 8), (6, 6)])
    prices = ("--price-per-million-input", "2", "--price-per-million-output", "10", "--api-key-variable", "JUDGE_KEY")
    with running() as server:
        assert judge(tmp_path, server, *files, *prices, "--yes", "--concurrency", "3") == 0
    output = capsys.readouterr().out
    assert "6 judgments: about" in output
    assert "at most 6,144 to write, at most about 0.062" in output
    assert "0.00024 spent" in output
    assert len(server.bodies) == 6
    assert server.headers[0]["Authorization"] == "Bearer secret-key"
    evaluation = read_evaluation(tmp_path / "judged.json")
    assert (evaluation.kind, evaluation.model) == ("judge_pairwise", "ours")
    (table,) = evaluation.tables
    assert table.title == "ours against theirs, judged by j"
    named = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    figures = ("questions", "n", "win rate", "wins", "ties", "losses", "without verdict", "orders agree")
    assert [[row[name] for name in figures] for row in named] == [
        ["all", 3, 0.5, 1, 1, 1, 0, 1.0],
        ["x", 1, 1.0, 1, 0, 0, 0, 1.0],
        ["y", 2, 0.25, 0, 1, 1, 0, 1.0],
    ]
    # The secret is in nothing that was written.
    assert all(b"secret-key" not in path.read_bytes() for path in tmp_path.iterdir())
    # All verdicts are there: nothing is asked, and nobody needs to agree.
    assert judge(tmp_path, server, *files, "--api-key-variable", "JUDGE_KEY") == 0


def test_a_judge_that_goes_by_place_decides_nothing_and_one_that_says_nothing_is_counted(tmp_path: Path, capsys: Any) -> None:
    files = write_both(tmp_path, "mt_bench", [(9, 4), (3, 8), (6, 6)])
    with running(lambda prompt: "[[A]]" if "1 + 2" not in prompt else "neither") as server:
        assert judge(tmp_path, server, *files, "--yes") == 1
        assert "Name the benchmark's question.jsonl with --questions" in capsys.readouterr().err
        assert judge(tmp_path, server, *files, "--yes", "--questions", str(tmp_path / "questions")) == 0
    assert "[turn 2]\nNow of the sea." in "".join(server.prompts())
    row = read_evaluation(tmp_path / "judged.json").tables[0].rows[0]
    assert row[:3] == ["all", 3, 0.5]
    assert row[6:11] == [0, 2, 0, 1, 0.0]


def test_nothing_is_asked_unless_that_is_wanted(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    files = write_both(tmp_path, "alpaca_eval", [(9, 4), (3, 8), (6, 6)])
    with running() as server:
        assert judge(tmp_path, server, *files) == 1
        assert "give --yes to go on, or a limit with --max-cost" in capsys.readouterr().err
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("builtins.input", lambda _: "n")
        assert judge(tmp_path, server, *files) == 1
        assert judge(tmp_path, server, *files, "--max-cost", "1") == 1
        assert "give --price-per-million-input" in capsys.readouterr().err
        assert server.bodies == []
        prices = ("--price-per-million-input", "1e5", "--price-per-million-output", "0", "--concurrency", "1")
        # A judgment costs 1: the limit stops it after two.
        assert judge(tmp_path, server, *files, *prices, "--max-cost", "1.5") == 1
        assert "2 is spent, after 2 of 6 judgments" in capsys.readouterr().err
        assert judge(tmp_path, server, *files, *prices, "--max-cost", "10") == 0
    assert len(server.bodies) == 6


def test_faults_leave_what_was_judged_and_the_next_start_goes_on(tmp_path: Path, capsys: Any) -> None:
    files = [*write_both(tmp_path, "jsonl", [(9, 4), (3, 8)]), "--yes", "--concurrency", "1"]
    with running(faults=[500]) as server:
        assert judge(tmp_path, server, *files) == 1
        error = capsys.readouterr().err
        assert "1 of 4 judgments were not made; start again to go on" in error
        assert len(error.splitlines()[-1]) < 400
        assert judge(tmp_path, server, *files) == 0
        assert len(server.bodies) == 5
        # Other settings do not mix with what is kept.
        assert judge(tmp_path, server, *files, "--temperature", "1") == 1
        assert "fields: {'temperature': 0.0" in capsys.readouterr().err
    # An endpoint that is down is not asked for every judgment.
    with running(faults=[503] * 9) as server:
        assert judge(tmp_path, server, *files, output="other.json") == 1
    assert len(server.bodies) <= 3
    assert "4 of 4 judgments were not made" in capsys.readouterr().err


def test_a_process_that_is_killed_loses_nothing_that_was_judged(tmp_path: Path) -> None:
    files = write_both(tmp_path, "alpaca_eval", [(9, 4), (3, 8), (6, 6)])
    held: list[str] = []

    def slowly(prompt: str) -> str:
        held.append(prompt)
        if len(held) > 3:
            time.sleep(0.7)
        return prefer_longer(prompt)

    with running(slowly) as server:
        given = ["--base-url", server.url, "--judge-model", "j", "--output", str(tmp_path / "judged.json"), *FAST]
        command = [sys.executable, str(ROOT / "tools/judge_pairwise.py"), *files, *given, "--yes", "--concurrency", "1"]
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
        kept = tmp_path / "judged.json.verdicts.jsonl"
        for _ in range(600):
            if kept.exists() and kept.read_bytes().count(b"\n") >= 4:
                break
            time.sleep(0.05)
        process.kill()
        process.wait()
        num_kept = kept.read_bytes().count(b"\n") - 1
        assert 3 <= num_kept < 6
        asked = len(server.bodies)
        held.clear()
        assert judge(tmp_path, server, *files, "--yes") == 0
        assert len(server.bodies) - asked == 6 - num_kept
    assert read_evaluation(tmp_path / "judged.json").tables[0].rows[0][2] == 0.5


def test_answers_to_other_questions_and_broken_templates_are_refused(tmp_path: Path, capsys: Any) -> None:
    files = write_both(tmp_path, "alpaca_eval", [(9, 4), (3, 8), (6, 6)])
    rows = json.loads((tmp_path / "theirs").read_text())
    (tmp_path / "theirs").write_text(json.dumps(rows[:2]))
    (tmp_path / "template").write_text("{question} {answer_a}")
    with running() as server:
        assert judge(tmp_path, server, *files, "--yes") == 1
        assert "1 questions are in one of them alone, such as Say sea." in capsys.readouterr().err
        assert judge(tmp_path, server, *files, "--yes", "--prompt-template", str(tmp_path / "template")) == 1
        assert "it has no {answer_b}" in capsys.readouterr().err
    assert server.bodies == []


def test_fields_can_be_put_in_the_place_of_others(tmp_path: Path) -> None:
    files = write_both(tmp_path, "arena_hard_v2", [(9, 4)])
    with running() as server:
        assert judge(tmp_path, server, *files, "--yes", "--extra-body", '{"max_tokens": null, "max_completion_tokens": 7}') == 0
    assert {*server.bodies[0]} == {"model", "messages", "temperature", "max_completion_tokens"}
    assert "Authorization" not in server.headers[0] or os.environ.get("OPENAI_API_KEY")
