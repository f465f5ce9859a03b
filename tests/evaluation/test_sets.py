"""Rows in the form of each benchmark's files become questions and stored pairs; what is left out is counted and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rmipo.data.encoding.tokenize import load_tokenizer
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.evaluation.sets import EvaluationSet, Reading, SetSource, prepare_set
from tests.data.tokenizers import save_byte_bpe
from tests.evaluation import miniatures
from tests.evaluation.miniatures import QUESTIONS, write_lines


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> Reading:
    folder = save_byte_bpe(tmp_path_factory.mktemp("tokenizer"))
    return Reading(load_tokenizer(str(folder)), str(folder), None, 512, None)


def texts(asked: EvaluationSet, reading: Reading) -> list[tuple[str, str, str]]:
    """Prompt, chosen and rejected answer of each pair that counts."""
    store = PairStore(asked.prefix)
    decode = lambda ids: reading.tokenizer.decode(ids.tolist())  # noqa: E731
    return [(decode(store[row].prompt), decode(store[row].chosen), decode(store[row].rejected)) for row in asked.pairs.tolist()]


@pytest.mark.parametrize(
    ("rows", "left_out"),
    [
        (miniatures.rewardbench, {}),
        (miniatures.llmbar, {}),
        (miniatures.pandalm, {"tied": 1}),
        (miniatures.hh, {}),
        (miniatures.ultrafeedback, {"tied": 1}),
    ],
)
def test_rows_that_are_pairs(
    tmp_path: Path,
    reading: Reading,
    rows: Callable[[], list[dict[str, Any]]],
    left_out: dict[str, int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", rows())
    asked = prepare_set(SetSource.parse(f"mine={path}"), tmp_path / "mine", reading)
    assert (asked.left_out, asked.num_rows) == (left_out, 5)
    kept = [row for row in range(5) if not (left_out and row == (1 if rows is miniatures.pandalm else 4))]
    assert [question.row for question in asked.questions] == kept
    for row, (prompt, chosen, rejected) in zip(kept, texts(asked, reading), strict=True):
        wanted = QUESTIONS[row][1:]
        if rows is miniatures.pandalm and row in (2, 4):  # whose annotators prefer the second
            wanted = wanted[::-1]
        assert prompt.startswith("<|begin_of_text|><|start_header_id|>")
        assert prompt.count("<|begin_of_text|>") == 1
        assert QUESTIONS[row][0] in prompt
        assert (chosen, rejected) == tuple(f"{answer}<|eot_id|>" for answer in wanted)
    if left_out:
        assert f"{path}: line {2 if rows is miniatures.pandalm else 5}: " in asked.examples[0]
    if rows is miniatures.rewardbench:
        assert asked.subsets[3] == "xstest-should-refuse"
        assert f"--data mine={path}: not read: chosen_model, rejected_model. " in (said := capsys.readouterr().err)
        assert "--ignore-columns" not in said
    assert EvaluationSet.from_json(json.loads(json.dumps(asked.to_json()))) == asked


def test_lists_of_answers_stand_in_pairs_each_at_least_once(tmp_path: Path, reading: Reading) -> None:
    rows = miniatures.rewardbench2()
    asked = prepare_set(SetSource.parse(f"rb2={write_lines(tmp_path / 'rows.jsonl', rows)}"), tmp_path / "rb2", reading)
    assert [question.kind for question in asked.questions] == ["best_of"] * 5 + ["ties"] * 2
    assert [question.name for question in asked.questions[-2:]] == ["ref:0", "tied:0"]
    assert asked.questions[0].answers == [(0, 0), (0, 1), (0, 2)]
    assert asked.questions[6].answers == [(0, 0), (1, 1), (2, 2), (0, 3)]
    found = texts(asked, reading)
    for question, numbers in zip(asked.questions, [question.pairs for question in asked.questions], strict=True):
        row = rows[question.row]
        for number, (good, bad) in zip(numbers, question.answers, strict=True):
            assert found[number][1:] == (f"{row['chosen'][good]}<|eot_id|>", f"{row['rejected'][bad]}<|eot_id|>")
    # RM-Bench's file is one JSON document.
    path = tmp_path / "total_dataset.json"
    path.write_text(json.dumps(miniatures.rm_bench()))
    asked = prepare_set(SetSource.parse(f"rm={path}#[:3]"), tmp_path / "rm", reading)
    assert [(one.kind, one.subset, one.answers) for one in asked.questions] == [
        ("styles", domain, [(0, 0), (1, 1), (2, 2)]) for domain in ("chat", "math", "safety-refuse")
    ]


def test_a_question_with_an_answer_too_long_is_left_out_whole(tmp_path: Path, reading: Reading) -> None:
    rows = miniatures.rewardbench2()[:3]
    rows[1]["rejected"][2] = "hello there, " * 400
    rows.append({"prompt": "x", "chosen": ["a", 3], "rejected": ["b"], "subset": "Math"})
    path = write_lines(tmp_path / "rows.jsonl", rows)
    with path.open("a") as stream:
        stream.write("no row\n")
    asked = prepare_set(SetSource.parse(f"rb2={path}"), tmp_path / "rb2", reading)
    assert [question.row for question in asked.questions] == [0, 2]
    assert asked.pairs.tolist() == [0, 1, 2, 5, 6, 7]
    assert asked.left_out == {"too_long": 1, "not_text": 1, "malformed": 1}
    assert any(f"{path}: line 2: " in example and "[too_long]" in example for example in asked.examples)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "Hello?", "chosen": "hello " * 600, "rejected": "no"}], "none of its 1 pairs can be used"),
        ([{"prompt": "Hello?", "chosen": [], "rejected": []}], "no row can be used"),
        ([{"question": "Hello?", "answers": "hello"}], "the format of the rows is not recognised"),
        ([{"prompt": "Hello?", "completion": "hello"}], "its rows hold supervised rows"),
    ],
)
def test_sets_of_which_nothing_can_be_used_are_refused(
    tmp_path: Path, reading: Reading, rows: list[dict[str, Any]], said: str
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=f"--data mine={path}: ") as caught:
        prepare_set(SetSource.parse(f"mine={path}"), tmp_path / "mine", reading)
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["data/pairs", "=data/pairs", "a b=data/pairs", "mine=", "mine=file#"])
def test_what_names_no_set_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected NAME=PREFIX"):
        SetSource.parse(text)
