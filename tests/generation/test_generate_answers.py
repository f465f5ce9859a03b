"""The command that answers a benchmark: forms, turns, going on after a kill, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.evaluation_file import read_evaluation
from megatron_rmipo.generation import cli
from megatron_rmipo.generation.answer_files import read_answers, write_answers
from megatron_rmipo.generation.kept_records import KeptRecords
from megatron_rmipo.generation.prompts import Prompts
from megatron_rmipo.generation.questions import BENCHMARKS, read_questions
from megatron_rmipo.generation.requests import Completion, Request
from megatron_rmipo.generation.sampling import Sampling
from tests.generation.models import QUESTIONS, save_chat_model, write_questions


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat") / "tiny")


class Pretended:
    """An engine that answers with the last ids of the prompt, and dies after so many batches."""

    name = "pretended"

    def __init__(self, batch_size: int = 2, dies_after: int = 99) -> None:
        self.batch_size, self.left = batch_size, dies_after
        self.asked: list[Request] = []

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.asked += requests
        return [Completion([300 + len(request.prompt_ids) % 200], ended=True) for request in requests]


def run(tmp_path: Path, model: Path, benchmark: str, *flags: str) -> int:
    questions = write_questions(tmp_path / "questions", benchmark)
    arguments = ["--model", str(model), "--benchmark", benchmark, "--prompts", str(questions), "--output", str(tmp_path / "out")]
    return cli.main([*arguments, *flags])


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_answers_have_the_form_of_each_benchmark(tmp_path: Path, benchmark: str) -> None:
    questions = read_questions(write_questions(tmp_path / "questions", benchmark), benchmark)
    turns = {question.key: [f"{question.key}: {text}" for text in question.asked] for question in questions}
    path = tmp_path / "answers"
    write_answers(path, benchmark, "tiny", questions, turns)
    text = path.read_text()
    rows: list[Any] = json.loads(text) if benchmark == "alpaca_eval" else [json.loads(line) for line in text.splitlines()]
    first, asked = rows[0], QUESTIONS[benchmark][0]
    for name in ("answer_id", "ans_id", "tstamp"):
        first.pop(name, None)
    assert (
        first
        == {
            "alpaca_eval": {"dataset": "x", "instruction": "Say a.", "output": "1: Say a.", "generator": "tiny"},
            "mt_bench": {"question_id": 81, "model_id": "tiny", "choices": [{"index": 0, "turns": turns.get("81")}]},
            "arena_hard": {
                **{"question_id": "f0", "model_id": "tiny"},
                "choices": [{"index": 0, "turns": [{"content": "f0: Bake {a} loaf."}]}],
            },
            "arena_hard_v2": {
                **{"uid": "u1", "model": "tiny", "metadata": {}},
                "messages": [
                    {"role": "user", "content": "Bake a loaf."},
                    {"role": "assistant", "content": {"answer": "u1: Bake a loaf."}},
                ],
            },
            "jsonl": {
                **{"id": "1", "generator": "tiny", "output": "1: Hello there"},
                "messages": [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "1: Hello there"}],
            },
        }[benchmark]
    )
    assert len(rows) == len(QUESTIONS[benchmark])
    read = read_answers(path)
    assert [list(answer.turns) for answer in read] == list(turns.values())
    assert {answer.generator for answer in read} == {"tiny"}
    if "turns" not in asked:
        assert [answer.asked for answer in read] == [question.asked for question in questions]


def test_a_second_turn_sees_the_first_answer_and_temperatures_go_by_category(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Pretended()
    monkeypatch.setattr(cli, "build_engine", lambda *_a, **_k: engine)
    assert run(tmp_path, model, "mt_bench", "--max-tokens", "20") == 0
    answers = {answer.key: answer.turns for answer in read_answers(tmp_path / "out" / "tiny.jsonl")}
    prompts = Prompts(model, None)
    shown = {prompts.decode([], request.prompt_ids): request for request in engine.asked}
    second = next(text for text in shown if "Now of the sea." in text)
    assert answers["81"][0]
    assert second.index("Write of bread.") < second.index(answers["81"][0]) < second.index("Now of the sea.")
    assert {request.temperature for text, request in shown.items() if "bread" in text} == {0.7}
    assert {request.temperature for text, request in shown.items() if "1 + 2" in text} == {0.0}
    assert len({request.seed for request in engine.asked}) == 6
    evaluation = read_evaluation(tmp_path / "out" / "tiny.evaluation.json")
    assert (evaluation.kind, evaluation.model) == ("generate_answers", "tiny")
    (table,) = evaluation.tables
    assert [row[:3] for row in table.rows] == [["all", 3, 6], ["math", 1, 2], ["stem", 1, 2], ["writing", 1, 2]]


def test_a_run_that_was_killed_goes_on_and_another_is_refused(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--temperature", "0.5", "--max-tokens", "3"]
    dying, going = Pretended(batch_size=1, dies_after=2), Pretended(batch_size=1)
    monkeypatch.setattr(cli, "build_engine", lambda *_a, **_k: dying)
    assert run(tmp_path, model, "alpaca_eval", *flags) == 130
    assert "the answers so far are kept" in capsys.readouterr().err
    assert not (tmp_path / "out" / "tiny.json").exists()
    kept = tmp_path / "out" / "tiny.kept"
    # As of a kill in the middle of a line.
    kept.write_bytes(kept.read_bytes() + b'{"key": "9", "tur')
    monkeypatch.setattr(cli, "build_engine", lambda *_a, **_k: going)
    assert run(tmp_path, model, "alpaca_eval", *flags[:-1], "4") == 1
    assert "max_tokens: 3 then, 4 now" in capsys.readouterr().err
    assert run(tmp_path, model, "alpaca_eval", *flags) == 0
    assert (len(dying.asked), len(going.asked)) == (2, 1)
    answers = read_answers(tmp_path / "out" / "tiny.json")
    assert [answer.asked[0] for answer in answers] == [row["instruction"] for row in QUESTIONS["alpaca_eval"]]
    # With all answers there, no model is loaded.
    monkeypatch.setattr(cli, "build_engine", None)
    assert run(tmp_path, model, "alpaca_eval", *flags) == 0


def test_the_whole_command_answers_with_a_model(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, model, "jsonl", "--max-tokens", "5", "--engine", "transformers", "--batch-size", "2") == 0
    output = capsys.readouterr().out
    assert f"wrote {tmp_path}/out/tiny.jsonl" in output
    assert "python tools/judge_pairwise.py --answers" in output
    records = [json.loads(line) for line in (tmp_path / "out" / "tiny.kept").read_text().splitlines()]
    assert records[0]["settings"]["engine"] == "transformers"
    assert all(0 < count <= 5 for record in records[1:] for count in record["num_tokens"])
    assert run(tmp_path, model, "mt_bench", "--print-judge-commands") == 0
    output = capsys.readouterr().out
    assert "python gen_judgment.py --model-list tiny --parallel 2" in output
    assert not (tmp_path / "out" / "tiny.evaluation").exists()


@pytest.mark.parametrize(("benchmark", "said"), [("alpaca_eval", "alpaca_eval --model_outputs"), ("arena_hard_v2", "gpt-4.1")])
def test_the_judges_commands_name_the_files(tmp_path: Path, model: Path, benchmark: str, said: str, capsys: Any) -> None:
    assert run(tmp_path, model, benchmark, "--print-judge-commands", "--model", f"a={model}", f"b c={model}") == 0
    output = capsys.readouterr().out
    assert said in output
    assert all(f"{tmp_path}/out/{name}.json" in output for name in ("a", "b c"))


@pytest.mark.parametrize(
    ("rows", "benchmark", "said"),
    [
        ('[{"prompt": "x"}]', "alpaca_eval", "row 1: no field 'instruction'. --benchmark alpaca_eval reads a JSON list"),
        ('{"question_id": 1, "turns": []}\n', "mt_bench", "row 1: no list of texts in 'turns'"),
        ('{"uid": "a", "prompt": "x"}\n{"uid": "a", "prompt": "y"}\n', "arena_hard", "row 2: a second row has the name 'a'"),
        ('{"prompt": " "}\n', "jsonl", "row 1: no text in 'prompt'"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\n', "jsonl", "the last of 'messages' is not the user's"),
        ('{"prompt": "x"}\n{"prompt"\n', "jsonl", "line 2: not valid JSON"),
        ("3\n", "jsonl", "row 1: an object is expected, found int"),
        ("\n", "jsonl", "the file is empty"),
    ],
)
def test_questions_of_another_form_are_refused(tmp_path: Path, rows: str, benchmark: str, said: str) -> None:
    path = tmp_path / "questions"
    path.write_text(rows)
    with pytest.raises(DataError) as error:
        read_questions(path, benchmark)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_what_cannot_work_is_refused_with_the_remedy(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*flags: str) -> str:
        assert run(tmp_path, model, "jsonl", *flags) == 1
        return capsys.readouterr().err

    assert "give one of them" in refused("--preset", "llama3", "--temperature", "0.3")
    assert "config.json cannot be read" in refused("--model", str(tmp_path / "none"))
    assert "two models are called tiny" in refused("--model", str(model), str(model))
    assert "cannot be the name of a file" in refused("--model", f"a/b={model}")
    long = tmp_path / "long"
    long.write_text(json.dumps({"prompt": "sea " * 300}))
    assert "and the model takes 160" in refused("--prompts", str(long))
    (tmp_path / "answers").write_text('{"text": "x"}\n')
    with pytest.raises(DataError, match="row 1: not an answer"):
        read_answers(tmp_path / "answers")


def test_two_processes_do_not_keep_in_one_file(tmp_path: Path) -> None:
    with KeptRecords(tmp_path / "kept", {"a": 1}), pytest.raises(ConfigError, match="another process writes it"):
        KeptRecords(tmp_path / "kept", {"a": 1})
    with KeptRecords(tmp_path / "kept", {"a": 1}) as kept:
        kept.add("x", {"b": 2})
    (tmp_path / "kept").write_bytes((tmp_path / "kept").read_bytes() + b"nonsense\n")
    with pytest.raises(DataError, match="line 3: not a record"):
        KeptRecords(tmp_path / "kept", {"a": 1})


def test_seeds_and_temperatures_of_one_question(tmp_path: Path) -> None:
    first, second, _ = read_questions(write_questions(tmp_path / "questions", "mt_bench"), "mt_bench")
    by_category, fixed = Sampling(None, 1.0, 5, 3), Sampling(0.4, 1.0, 5, 4)
    assert [by_category.temperature_of(one) for one in (first, second)] == [0.7, 0.0]
    assert fixed.temperature_of(second) == 0.4
    seeds = [sampling.seed_of(one, turn) for sampling in (by_category, fixed) for one in (first, second) for turn in (0, 1)]
    assert len(set(seeds)) == 8
    assert by_category.seed_of(first, 1) == seeds[1]
