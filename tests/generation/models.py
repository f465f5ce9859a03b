"""A small chat model with random weights, and questions in the form of each benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.data.tokenizers import save_byte_bpe

QUESTIONS: dict[str, list[dict[str, Any]]] = {
    "alpaca_eval": [
        {"instruction": f"Say {word}.", "dataset": data} for word, data in (("a", "x"), ("bread", "y"), ("sea", "y"))
    ],
    "mt_bench": [
        {"question_id": 81, "category": "writing", "turns": ["Write of bread.", "Now of the sea."]},
        {"question_id": 97, "category": "math", "turns": ["What is 1 + 2?", "And with 3?"]},
        {"question_id": 99, "category": "stem", "turns": ["Why does the river run to the sea?", "Why?"]},
    ],
    "arena_hard": [{"question_id": "f0", "category": "c", "turns": [{"content": "Bake {a} loaf."}]}],
    "arena_hard_v2": [{"uid": "u1", "category": "hard_prompt", "prompt": "Bake a loaf."}],
    "jsonl": [
        {"prompt": "Hello there"},
        {"id": "own", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]},
    ],
}


def write_questions(path: Path, benchmark: str) -> Path:
    rows = QUESTIONS[benchmark]
    path.write_text(json.dumps(rows) if benchmark == "alpaca_eval" else "".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_chat_model(directory: Path, **settings: Any) -> Path:
    """A Llama of 37 thousand parameters; its own generation config asks for what an evaluation did not."""
    save_byte_bpe(directory)
    fields = {
        **{"vocab_size": 600, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3},
        **{"num_key_value_heads": 1, "max_position_embeddings": 160, "initializer_range": 0.4, "eos_token_id": 4},
    }
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**fields, **settings}))
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0)
    model.save_pretrained(directory)
    return directory
