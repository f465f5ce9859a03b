"""The prompts of --sample-prompts: their forms, how the model reads them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rmipo.data.encoding.carried import chat_form
from megatron_rmipo.data.encoding.chat import load_template
from megatron_rmipo.data.encoding.tokenize import load_tokenizer, without_bos
from megatron_rmipo.data.reading.rows import Turn
from megatron_rmipo.data.store.chat_form import ChatForm
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


def read(path: Path, tokenizer: Path, chat: ChatForm | None = None, *, most_tokens: int = 200) -> Prompts:
    return read_prompts(path, load_tokenizer(str(tokenizer)), chat, most_tokens=most_tokens)


def test_prompts_are_read_as_apply_chat_template_has_them(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    rows: list[Any] = [{"prompt": "what is red?"}, {"messages": TURNS}, {"prompt": TURNS[1:2]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "lines.txt").write_text("what is red?\n\nhello\n")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert tokenizer.chat_template is not None
    found = read(tmp_path / "rows.jsonl", MODEL)
    conversations = [[{"role": "user", "content": "what is red?"}], TURNS, TURNS[1:2]]
    expected = [tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False) for one in conversations]
    assert [prompt.token_ids for prompt in found.prompts] == expected
    texts = ["what is red?", "system: be brief\nuser: hello\nassistant: hi\nuser: what is red?", "hello"]
    assert [prompt.text for prompt in found.prompts] == texts
    assert tokenizer.eos_token_id in found.ends
    lines = read(tmp_path / "lines.txt", MODEL)
    assert [prompt.token_ids for prompt in lines.prompts] == [expected[0], expected[2]]


def test_the_template_of_the_data_comes_before_that_of_the_tokenizer(tmp_path: Path) -> None:
    save_byte_bpe(tmp_path / "base", chat_template=None)
    (tmp_path / "lines").write_text("what is red?\n")
    (tmp_path / "mine.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    base = load_tokenizer(str(tmp_path / "base"))
    assert base.chat_template is None
    (plain,) = read(tmp_path / "lines", tmp_path / "base").prompts
    assert base.decode(plain.token_ids).endswith("what is red?")
    for directory, choice, bos, start in (
        (tmp_path / "base", "llama3", "template", [base.info.bos_token_id]),
        (MODEL, str(tmp_path / "mine.jinja"), "never", []),
        (MODEL, str(tmp_path / "mine.jinja"), "always", [load_tokenizer(str(MODEL)).info.bos_token_id]),
    ):
        known = load_tokenizer(str(directory))
        template = load_template(choice, known, bos=bos)
        form = chat_form(template, known, official=False)
        found = read(tmp_path / "lines", directory, form)
        text = template.render([Turn("user", "what is red?")], add_generation_prompt=True)
        assert found.prompts[0].token_ids == start + without_bos(known.encode(text), known.info.bos_token_id)
        assert form is not None
        assert {form.end_token_id, known.info.eos_token_id} <= found.ends


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
