"""The tokenizer's two forms are one vocabulary, and its template is Llama 3's."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
import transformers

from megatron_rmipo.embedded.pairs import make_rows, tokenizer_texts
from megatron_rmipo.embedded.tokenizer import save_tokenizer, train_sentencepiece


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_sentencepiece([*tokenizer_texts(900, seed=5), "system", "user", "assistant"], 700), path)
    return path


def test_both_forms_give_the_same_ids_and_the_text_back(directory: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert len(tokenizer) == processor.get_piece_size() == 700
    texts = [text for row in make_rows(5, 60, 5, seed=6)[1] for text in (row.prompt, row.chosen, row.rejected)]
    # Words and characters it was not trained on, spaces in odd places, newlines.
    texts += ["  Zwei  wörter\n\nund 漢字 ", "xylophone-quartz", "", " ", "\n", "tips.\nTo repair"]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == processor.encode(text), text
        assert tokenizer.decode(ids) == text


def test_words_of_the_world_are_few_tokens(directory: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    text = make_rows(1, 1, 1, seed=8)[1][0].chosen
    assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) < 2.5 * len(text.split())


def test_chat_template(directory: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    prompt = [{"role": "user", "content": " Hello "}]
    rendered = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": "Hi."}], tokenize=False)
    assert whole == rendered + "Hi.<|eot_id|>"
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert (ids.count(tokenizer.bos_token_id), ids[0], ids[-1]) == (1, tokenizer.bos_token_id, tokenizer.eos_token_id)
    # Each header mark is one token.
    assert ids.count(tokenizer.convert_tokens_to_ids("<|start_header_id|>")) == 2
