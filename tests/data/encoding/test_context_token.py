"""What stands before a response in log p(y): BOS, what begins every prompt, or nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_rmipo.data.encoding.context_token import find_context_token
from megatron_rmipo.data.encoding.tokenize import load_tokenizer
from megatron_rmipo.data.store.manifest import Manifest
from tests.data.tokenizers import save_byte_bpe, save_sentencepiece


@pytest.mark.parametrize(
    ("bos", "first", "expected", "words"),
    [
        ("<|begin_of_text|>", ["<|start_header_id|>"], "<|begin_of_text|>", "the tokenizer's BOS"),
        (None, ["<|start_header_id|>"], "<|start_header_id|>", "which begins every prompt; the tokenizer has no BOS"),
        (None, ["<|start_header_id|>", "<|start_header_id|>"], "<|start_header_id|>", "begins every prompt"),
        # Another data set begins otherwise; a data set whose prompts differ; an ordinary token.
        (None, ["<|start_header_id|>", "<|eot_id|>"], None, "its first token not scored"),
        (None, ["<|start_header_id|>", None], None, "its first token not scored"),
        (None, ["!"], None, "no special token begins every prompt"),
    ],
)
def test_bos_or_what_begins_every_prompt_or_nothing(
    tmp_path: Path, bos: str | None, first: list[str | None], expected: str | None, words: str
) -> None:
    tokenizer = load_tokenizer(str(save_byte_bpe(tmp_path, bos=bos)))
    ids = tokenizer.backend.vocabulary()
    manifest = Manifest(tokenizer.info)
    manifests = [dataclasses.replace(manifest, first_token_id=ids[token] if token else None) for token in first]
    context = find_context_token(tokenizer, manifests)
    assert context.token_id == (ids[expected] if expected else None)
    assert words in context.text
    assert expected is None or f"after {expected} (token {ids[expected]})" in context.text


def test_a_sentencepiece_bos_is_named(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(save_sentencepiece(tmp_path / "t.model")))
    assert find_context_token(tokenizer, [Manifest(tokenizer.info)]).text == "after <s> (token 1), the tokenizer's BOS"
