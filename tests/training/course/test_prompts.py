"""The prompts of --sample-prompts: their forms, how the model reads them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rmipo.data.encoding.tokenize import load_tokenizer
from megatron_rmipo.data.store.manifest import Manifest
from megatron_rmipo.errors import DataError
from megatron_rmipo.training.course.prompts import Prompts, read_prompts
from tests.data.tokenizers import save_byte_bpe
from tests.integration.data import MODEL

TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "what is red?"},
]


def read(path: Path, tokenizer: Path, *, most_tokens: int = 200, **of_data: Any) -> Prompts:
    known = load_tokenizer(str(tokenizer))
    return read_prompts(path, known, Manifest(tokenizer=known.info, **of_data), most_tokens=most_tokens)


def test_prompts_are_read_as_apply_chat_template_has_them(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    rows: list[Any] = [{"prompt": "what is red?"}, {"messages": TURNS}, {"prompt": TURNS[1:2]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "lines.txt").write_text("what is red?\n\nhello\n")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert tokenizer.chat_template is not None
    found = read(tmp_path / "rows.jsonl", MODEL, template_name="tokenizer", bos="template")
    conversations = [[{"role": "user", "content": "what is red?"}], TURNS, TURNS[1:2]]
    expected = [tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False) for one in conversations]
    assert [prompt.token_ids for prompt in found.prompts] == expected
    texts = ["what is red?", "system: be brief\nuser: hello\nassistant: hi\nuser: what is red?", "hello"]
    assert [prompt.text for prompt in found.prompts] == texts
    assert tokenizer.eos_token_id in found.ends
    lines = read(tmp_path / "lines.txt", MODEL, template_name="tokenizer", bos="template")
    assert [prompt.token_ids for prompt in lines.prompts] == [expected[0], expected[2]]


def test_a_model_without_a_template_reads_what_its_data_were_prepared_with(tmp_path: Path) -> None:
    save_byte_bpe(tmp_path / "base", chat_template=None)
    (tmp_path / "lines").write_text("what is red?\n")
    tokenizer = load_tokenizer(str(tmp_path / "base"))
    assert tokenizer.chat_template is None
    (plain,) = read(tmp_path / "lines", tmp_path / "base").prompts
    assert tokenizer.decode(plain.token_ids).endswith("what is red?")
    (built_in,) = read(tmp_path / "lines", tmp_path / "base", template_name="llama3").prompts
    assert "<|start_header_id|>user<|end_header_id|>" in tokenizer.decode(built_in.token_ids)
    assert tokenizer.decode(built_in.token_ids).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", r"--sample-prompts .*p.jsonl: no prompt in it"),
        ("{", r"p.jsonl:1: a JSON object with prompt"),
        ('{"prompt": "x"}\n{"text": "x"}', r"p.jsonl:2: a JSON object with prompt"),
        (json.dumps({"messages": TURNS[:3]}), r"p.jsonl:1: .*the last one not the assistant's"),
        ('{"messages": [{"role": "pope", "content": "x"}]}', r"p.jsonl:1: a message has the role 'pope'"),
        (json.dumps({"prompt": "a b c d e " * 30}), r"p.jsonl:1: a prompt of \d+ tokens; with --sample-length it has 1 to 50"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(DataError, match=told):
        read(tmp_path / "p.jsonl", MODEL, most_tokens=50)
    with pytest.raises(DataError, match=r"--sample-prompts .*nowhere: cannot be read"):
        read(tmp_path / "nowhere", MODEL)
