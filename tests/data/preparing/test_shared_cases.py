"""Small files of kinds that people have, from the shared folder, end to end: each becomes the right pairs, or a named refusal."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_rmipo.data.encoding.tokenize import load_tokenizer
from megatron_rmipo.data.preparing.preprocess_cli import main
from megatron_rmipo.data.store.pair_store import PairStore
from tests.data.tokenizers import shared_data

CASES = shared_data().parent / "cases"
NAMES = sorted(path.name for path in CASES.iterdir() if path.is_dir()) if CASES.is_dir() else []
FLAGS = {"template_needs_strftime_now": "date.jinja", "template_without_generation_prompt": "nogen.jinja"}


class Outcome(NamedTuple):
    """What the tool made of a case: exit code, what it said, (prompt, chosen, rejected) texts, counts."""

    code: int
    said: str
    pairs: list[tuple[str, str, str]]
    counts: dict[str, int]


def outcome_of(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Outcome:
    case = CASES / name
    source = case / ("DIR" if (case / "DIR").is_dir() else "in.jsonl")
    flags = ["--input", str(source), "--tokenizer-model", str(case / "tok"), "--output-prefix", str(folder / "out")]
    code = main([*flags, *(["--chat-template", str(case / FLAGS[name])] if name in FLAGS else [])])
    said = "".join(capsys.readouterr())
    if code:
        return Outcome(code, said, [], {})
    store, tokenizer = PairStore(folder / "out"), load_tokenizer(str(case / "tok"))
    pairs = [tuple(tokenizer.decode(list(part)) for part in (p.prompt, p.chosen, p.rejected)) for p in store]
    return Outcome(code, said, pairs, store.manifest.counts)  # type: ignore[arg-type]


def told(case: str, kind: str) -> list[str]:
    """The renderings of transformers that a case's README quotes."""
    lines = re.findall(rf"^  {kind} +('.*')$", (CASES / case / "README").read_text(), re.MULTILINE)
    return [ast.literal_eval(line) for line in lines]


@pytest.mark.skipif(not NAMES, reason="no shared cases")
@pytest.mark.parametrize("name", NAMES)
def test_a_case_comes_out_right(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = outcome_of(name, tmp_path, capsys)
    CHECKS[name](outcome)


def _directory(outcome: Outcome) -> None:
    assert outcome.counts["kept"] == 10 or (outcome.code == 1 and "b.parquet" in outcome.said)


def _end_of_turn(outcome: Outcome) -> None:
    for _, *responses in outcome.pairs:
        assert [text.endswith("<|im_end|>") and text.count("<|") == 1 for text in responses] == [True, True], responses


def _winners(outcome: Outcome) -> None:
    assert [(chosen[:4], rejected[:3]) for _, chosen, rejected in outcome.pairs] == [("good", "bad")] * 2
    assert "Q1\ncontext 1" in outcome.pairs[0][0]
    assert outcome.counts["rejected/tied"] == 1


def _labels(outcome: Outcome) -> None:
    assert (outcome.counts["desirable"], outcome.counts["undesirable"]) == (1, 1)
    assert [bool(chosen) for _, chosen, _ in outcome.pairs] == [False, True]


def _ms_swift(outcome: Outcome) -> None:
    texts = [(chosen.partition("<|")[0], rejected.partition("<|")[0]) for _, chosen, rejected in outcome.pairs]
    assert texts == [("A kitten.", "A puppy."), ("A cup.", "A bowl.")]


def _parts(outcome: Outcome) -> None:
    ((_, chosen, _),) = outcome.pairs
    assert re.search(r"hmm\n</think>\s+A<\|im_end\|>$", chosen)


def _kept(outcome: Outcome) -> None:
    assert (outcome.code, [chosen.partition("<|")[0] for _, chosen, _ in outcome.pairs]) == (0, ["Yes"]), outcome.said


def _header_in_prompt(outcome: Outcome) -> None:
    _kept(outcome)
    assert outcome.pairs[0][0].endswith("<|im_start|>assistant\n")


def _thinking(outcome: Outcome) -> None:
    ((prompt, chosen, _),) = outcome.pairs
    (whole,) = told("thinking_prefill_template", "whole")
    assert whole == prompt + chosen
    assert told("thinking_prefill_template", "prompt")[0].startswith(prompt)


def _tool_calls(outcome: Outcome) -> None:
    prompts, wholes = (told("tool_calls_dropped", kind) for kind in ("prompt", "whole"))
    assert [prompt for prompt, _, _ in outcome.pairs] == prompts
    assert [prompt + chosen + "\n" for prompt, chosen, _ in outcome.pairs] == wholes


def _utf16(outcome: Outcome) -> None:
    if outcome.code:
        assert "UTF-16" in outcome.said
    else:
        assert len(outcome.pairs) == 3
        assert all("\u043c\u0438\u0440" in "".join(pair) for pair in outcome.pairs)


CHECKS = {
    "directory_of_two_kinds": _directory,
    "end_of_turn_not_special": _end_of_turn,
    "label_selects_answer": _winners,
    "labels_not_boolean": _labels,
    "ms_swift_rejected_response": _ms_swift,
    "parts_reasoning_and_value": _parts,
    "template_needs_strftime_now": _kept,
    "template_without_generation_prompt": _header_in_prompt,
    "thinking_prefill_template": _thinking,
    "tool_calls_dropped": _tool_calls,
    "utf16_garbled": _utf16,
}
