from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rmipo.data.encoding.chat import load_template
from megatron_rmipo.data.encoding.encode import EncodedPair, LengthPolicy, PairEncoder
from megatron_rmipo.data.encoding.official import encode_official, render_official
from megatron_rmipo.data.encoding.tokenize import PreferenceTokenizer, load_tokenizer
from megatron_rmipo.data.layouts.formats import FORMATS
from megatron_rmipo.data.reading.rows import RowFault, Turn
from megatron_rmipo.errors import DataError
from tests.data.pairs import pair_of
from tests.data.tokenizers import save_byte_bpe, shared_data

PROMPT, CHOSEN, REJECTED = "[INST] Why? [/INST]", " Because the sea does not fill. </s>", " No idea, read it again. </s>"


def test_within_the_limit_nothing_is_cut(pieces: PreferenceTokenizer) -> None:
    prompt, (chosen, rejected), truncated = encode_official(pieces, PROMPT, (CHOSEN, REJECTED), 512, 256)
    assert not truncated
    assert (prompt, chosen) == pieces.encode_rendered(PROMPT, CHOSEN)
    assert (prompt, rejected) == pieces.encode_rendered(PROMPT, REJECTED)


def test_the_prompt_keeps_its_end_and_loses_bos(pieces: PreferenceTokenizer) -> None:
    prompt, (chosen, rejected), _ = encode_official(pieces, PROMPT, (CHOSEN, REJECTED), 512, 256)
    limit = len(prompt) + max(len(chosen), len(rejected)) - 1
    assert encode_official(pieces, PROMPT, (CHOSEN, REJECTED), limit, 5) == (prompt[-5:], [chosen, rejected], True)


def test_then_responses_keep_their_beginning_and_lose_eos(pieces: PreferenceTokenizer) -> None:
    prompt, (chosen, rejected), _ = encode_official(pieces, PROMPT, (CHOSEN, REJECTED), 512, 256)
    assert encode_official(pieces, PROMPT, (CHOSEN, REJECTED), 9, 5) == (prompt[-5:], [chosen[:4], rejected[:4]], True)


def test_a_boundary_that_differs_between_the_responses_is_refused(byte_bpe: PreferenceTokenizer) -> None:
    text = "Mix flour, water and salt; wait; bake it hot."
    reasons = [_fault_reason(byte_bpe, text[:cut], text[cut:]) for cut in range(5, len(text))]
    assert set(reasons) == {None, "boundary"}


def _fault_reason(tokenizer: PreferenceTokenizer, prompt: str, response: str) -> str | None:
    try:
        encode_official(tokenizer, prompt, (response, "\u00e9 another"), 512, 256)
    except RowFault as fault:
        return fault.reason
    return None


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(save_byte_bpe(tmp_path, eos=None)))
    with pytest.raises(DataError, match="needs a tokenizer with BOS and EOS"):
        encode_official(tokenizer, "a", ("b", "c"), 512, 256)


def test_answers_are_rendered_alone_without_bos(byte_bpe: PreferenceTokenizer) -> None:
    template = load_template("llama3", byte_bpe)
    prompt, chosen, _ = render_official(template, pair_of((Turn("user", "Why?"),), "So.", "No."))
    assert prompt == "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
    assert chosen == "<|start_header_id|>assistant<|end_header_id|>\n\nSo.<|eot_id|>"


@pytest.mark.skipif(not shared_data().is_dir(), reason="no shared data")
@pytest.mark.parametrize(
    ("name", "rows_file", "row_format"), [("hh200", "hh/helpful-train", "hh"), ("uf200", "ultrafeedback/train", "strings")]
)
@pytest.mark.parametrize("limits", [(1024, 512), (256, 128)])
def test_the_authors_text_and_ids_from_raw_rows(name: str, rows_file: str, row_format: str, limits: tuple[int, int]) -> None:
    tokenizer = load_tokenizer(str(shared_data() / "tokenizers" / "mistral-v1.model"))
    template = load_template("mistral", tokenizer)
    expected_file = shared_data() / "official_tokenization" / f"{name}_{limits[0]}_{limits[1]}.jsonl"
    expected = [json.loads(line) for line in expected_file.read_text().splitlines()]
    raw = (shared_data() / f"{rows_file}.jsonl").read_text().splitlines()
    pairs = [FORMATS[row_format](json.loads(raw[row["source_row"]])) for row in expected]
    encoded = PairEncoder(tokenizer, template, LengthPolicy(limits[0], "official", limits[1])).encode(pairs)
    assert len(expected) == 200
    for row, pair, result in zip(expected, pairs, encoded, strict=True):
        assert render_official(template, pair) == (row["text"]["prompt"], row["text"]["chosen"], row["text"]["rejected"])
        assert isinstance(result, EncodedPair)
        assert (result.prompt, result.chosen, result.rejected) == (row["chosen_prompt"], row["chosen"], row["rejected"])
