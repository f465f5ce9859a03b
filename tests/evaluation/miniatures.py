"""Made-up rows in the form that each benchmark's files have, and a small model with a tokenizer and a chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.data.tokenizers import LLAMA3_SPECIALS, save_byte_bpe
from tests.integration.problem import make_hf_model

QUESTIONS = [
    ("What runs to the sea?", "The river runs to the sea.", "The bread does."),
    ("How do I bake bread?", "Mix flour, water and salt; wait; bake it hot.", "Read it again."),
    ("Write a line of code.", "def add(a, b):\n    return a + b", "print(1"),
    ("Say hello.", "hello to you", "No."),
    ("Does the sea fill?", "It does not.", "The sea does fill, and the river does not run, that is the whole of it."),
]
STYLES = ("{}", "It is this: {} That is the whole.", "**It is this**\n\n- {}\n")


def rewardbench() -> list[dict[str, Any]]:
    subsets = ("alpacaeval-easy", "hep-cpp", "alpacaeval-easy", "xstest-should-refuse", "math-prm")
    models = {"chosen_model": "a", "rejected_model": "b"}
    return [
        {"prompt": prompt, "chosen": good, **models, "rejected": bad, "subset": subset, "id": number}
        for number, ((prompt, good, bad), subset) in enumerate(zip(QUESTIONS, subsets, strict=True))
    ]


def rewardbench2() -> list[dict[str, Any]]:
    def row(name: str, subset: str, prompt: str, good: list[str], bad: list[str]) -> dict[str, Any]:
        counts = {"num_correct": len(good), "num_incorrect": len(bad), "total_completions": len(good) + len(bad)}
        return {"id": name, "prompt": prompt, "chosen": good, "rejected": bad, **counts, "models": ["m"], "subset": subset}

    rows = [
        row(str(number), ("Math", "Focus")[number % 2], prompt, [good], [bad, f"{bad} Yes.", "hello there"])
        for number, (prompt, good, bad) in enumerate(QUESTIONS)
    ]
    rows.append(row("ref:0", "Ties", "Name 7.", ["7"], ["8", "9", "6"]))
    rows.append(row("tied:0", "Ties", "Name a digit.", ["7", "8", "0"], ["river", "the sea", "salt", "bread"]))
    return rows


def rm_bench() -> list[dict[str, Any]]:
    domains = ("chat", "math", "safety-refuse", "safety-response", "chat")
    return [
        {
            "id": number,
            "prompt": prompt,
            "chosen": [style.format(good) for style in STYLES],
            "rejected": [style.format(bad) for style in STYLES],
            "domain": domain,
        }
        for number, ((prompt, good, bad), domain) in enumerate(zip(QUESTIONS, domains, strict=True))
    ]


def llmbar() -> list[dict[str, Any]]:
    return [
        {"input": prompt, "output_1": (good, bad)[number % 2], "output_2": (bad, good)[number % 2], "label": 1 + number % 2}
        for number, (prompt, good, bad) in enumerate(QUESTIONS)
    ]


def pandalm() -> list[dict[str, Any]]:
    """The second is a tie of its annotators."""
    votes = [(1, 1, 2), (0, 0, 1), (2, 2, 2), (1, 1, 1), (2, 0, 2)]
    return [
        {
            **{"idx": number, "motivation_app": "made", "instruction": prompt, "input": "" if number else "Now."},
            **{"response1": good, "response2": bad, "annotator1": first, "annotator2": second, "annotator3": third},
        }
        for number, ((prompt, good, bad), (first, second, third)) in enumerate(zip(QUESTIONS, votes, strict=True))
    ]


def hh() -> list[dict[str, Any]]:
    start = "\n\nHuman: hello\n\nAssistant: hello to you\n\nHuman: {}\n\nAssistant: {}"
    return [{"chosen": start.format(prompt, good), "rejected": start.format(prompt, bad)} for prompt, good, bad in QUESTIONS]


def ultrafeedback() -> list[dict[str, Any]]:
    """The last has two equal scores."""
    return [
        {
            "prompt": prompt,
            "prompt_id": str(number),
            "chosen": [{"role": "user", "content": prompt}, {"role": "assistant", "content": good}],
            "rejected": [{"role": "user", "content": prompt}, {"role": "assistant", "content": bad}],
            "score_chosen": 8.0,
            "score_rejected": 4.0 + number,
        }
        for number, (prompt, good, bad) in enumerate(QUESTIONS)
    ]


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_model(directory: Path, *, seed: int = 0) -> Path:
    """A model whose tokenizer has a chat template in Llama 3's manner."""
    save_byte_bpe(directory)
    vocabulary = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    ids = {token: vocabulary[token] for token in LLAMA3_SPECIALS[:2]}
    special = {"bos_token_id": ids[LLAMA3_SPECIALS[0]], "eos_token_id": ids[LLAMA3_SPECIALS[1]]}
    return make_hf_model(directory, vocab_size=len(vocabulary), seed=seed, initializer_range=0.2, **special)
