from __future__ import annotations

import json
from pathlib import Path

from megatron_rmipo.data.encoding.tokenize import load_tokenizer
from megatron_rmipo.data.preparing.preprocess import PreprocessOptions, preprocess
from megatron_rmipo.data.store.chat_form import ChatForm, carried_form
from megatron_rmipo.data.store.manifest import Manifest, TokenizerInfo
from tests.data.tokenizers import save_byte_bpe

INFO = TokenizerInfo("f", 100, 1, 2)


def named(template: str, form: ChatForm | None) -> Manifest:
    return Manifest(INFO, template_name=template, chat=form)


def test_the_first_data_set_says_how_prompts_are_written_and_others_are_told_of() -> None:
    one, other = ChatForm("a", None, 2), ChatForm("b", None, 2)
    assert carried_form([("x", named("zephyr", one)), ("y", named("zephyr", one))]) == (one, [])
    form, notes = carried_form([("x", named("none", None)), ("y", named("hh", one)), ("z", named("mine", other))])
    assert form == one
    assert notes == ["the chat template of z is another than that of y, which an export carries"]
    form, (note,) = carried_form([("old", named("zephyr", None)), ("y", named("tokenizer", None))])
    assert form is None
    assert note.startswith("old was prepared by an earlier version, which did not keep its chat template (zephyr)")


def test_a_data_set_keeps_its_template(tmp_path: Path) -> None:
    tokenizer = save_byte_bpe(tmp_path / "tokenizer")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Why?", "chosen": "So.", "rejected": "No."}) + "\n")
    prefix = tmp_path / "pairs"
    options = PreprocessOptions((str(tmp_path / "rows.jsonl"),), str(tokenizer), str(prefix), chat_template="llama3")
    preprocess(options)
    found = Manifest.read(prefix.with_suffix(".json")).chat
    assert found is not None
    assert "<|start_header_id|>" in found.template
    ours = load_tokenizer(str(tokenizer))
    assert found.end_token_id == ours.backend.special_ids["<|eot_id|>"]
    preprocess(PreprocessOptions((str(tmp_path / "rows.jsonl"),), str(tokenizer), str(tmp_path / "raw"), chat_template="none"))
    assert Manifest.read(tmp_path / "raw.json").chat is None
