from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rmipo.data.encoding.backends import HfBackend
from megatron_rmipo.data.encoding.tokenize import PreferenceTokenizer, load_tokenizer, tokenizer_fingerprint, with_one_bos
from megatron_rmipo.errors import DataError
from tests.data.tokenizers import save_byte_bpe, save_sentencepiece, shared_data

PARITY = Path(__file__).parents[2] / "parity" / "fixtures"
RESPONSES = (" the river", "the river", "\n\nThen read", "  two spaces", "e", "\u00e9\u4e2d\U0001f600", "t, water and salt")


@pytest.mark.parametrize("kind", ["byte_bpe", "pieces"])
@pytest.mark.parametrize("response", RESPONSES)
def test_the_boundary_is_exact_whatever_merges_across_it(kind: str, response: str, request: pytest.FixtureRequest) -> None:
    tokenizer: PreferenceTokenizer = request.getfixturevalue(kind)
    prompt = "Mix flour, water and sal"
    prompt_ids, response_ids = tokenizer.encode_rendered(prompt, response)
    assert prompt_ids == [tokenizer.info.bos_token_id, *tokenizer.encode(prompt)]
    assert response_ids[-1] == tokenizer.info.eos_token_id
    assert tokenizer.info.eos_token_id not in response_ids[:-1]
    assert tokenizer.decode(prompt_ids[1:]) == prompt
    assert tokenizer.decode_continuation(prompt_ids, response_ids[:-1]) == response


@pytest.mark.parametrize(
    ("kind", "prompt"), [("byte_bpe", "Why?<|end_header_id|>"), ("pieces", "[INST] Why does it not fill? [/INST]")]
)
def test_where_nothing_merges_the_ids_are_those_of_the_whole_text(kind: str, prompt: str, request: pytest.FixtureRequest) -> None:
    tokenizer: PreferenceTokenizer = request.getfixturevalue(kind)
    prompt_ids, response_ids = tokenizer.encode_rendered(prompt, " The sea, and the river.")
    assert [*prompt_ids[1:], *response_ids[:-1]] == tokenizer.encode(prompt + " The sea, and the river.")


def test_these_tokenizers_do_merge_across_boundaries(byte_bpe: PreferenceTokenizer, pieces: PreferenceTokenizer) -> None:
    text = "Mix flour, water and salt; wait; bake it hot."
    for tokenizer in (byte_bpe, pieces):
        merging = 0
        for cut in range(1, len(text)):
            prompt_ids, response_ids = tokenizer.encode_rendered(text[:cut], text[cut:])
            merging += [*prompt_ids[1:], *response_ids[:-1]] != tokenizer.encode(text)
            assert tokenizer.decode([*prompt_ids[1:], *response_ids[:-1]]) == text
        assert merging > 10


def test_bos_and_eos_stand_once_however_often_the_text_has_them(
    byte_bpe: PreferenceTokenizer, pieces: PreferenceTokenizer
) -> None:
    for tokenizer, bos, eos in ((byte_bpe, "<|begin_of_text|>", "<|end_of_text|>"), (pieces, "<s>", "</s>")):
        plain = tokenizer.encode_rendered("[INST] a", " b")
        assert tokenizer.encode_rendered(f"{bos}[INST] a", f" b{eos}") == plain
        assert tokenizer.encode_rendered(f"{bos}{bos}[INST] a", f" b{eos}{eos}") == plain
        with pytest.raises(DataError, match="end-of-sequence token"):
            tokenizer.encode_rendered("[INST] a", f" b{eos} c")


def test_with_one_bos() -> None:
    assert with_one_bos([], 1) == [1]
    assert with_one_bos([1, 1, 5, 1], 1) == [1, 5, 1]
    assert with_one_bos([5, 1], None) == [5, 1]


@pytest.mark.parametrize("run", ["rmipo", "simpo"])
def test_the_authors_ids_from_the_authors_rendered_text(run: str) -> None:
    tokenizer = load_tokenizer(str(PARITY / run / "model"))
    rows = [json.loads(line) for line in (PARITY / run / "rows.jsonl").read_text().splitlines()]
    pairs = [json.loads(line) for line in (PARITY / run / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == len(pairs) == 48
    for row, pair in zip(rows, pairs, strict=True):
        for name in ("chosen", "rejected"):
            assert tokenizer.encode_rendered(row["rendered"]["prompt"], row["rendered"][name]) == (pair["prompt"], pair[name])


def test_slow_fast_and_sentencepiece_forms_have_one_fingerprint(tmp_path: Path) -> None:
    directory = load_tokenizer(str(PARITY / "rmipo" / "model"))
    assert load_tokenizer(str(PARITY / "rmipo" / "model" / "tokenizer.model")).info == directory.info
    assert load_tokenizer(str(PARITY / "rmipo" / "model" / "tokenizer.json")).info == directory.info
    assert load_tokenizer(str(PARITY / "simpo" / "model")).info.fingerprint != directory.info.fingerprint


def test_the_fingerprint_depends_on_tokens_ids_and_special_ids_alone() -> None:
    fingerprint = tokenizer_fingerprint({"a": 0, "b": 1}, 0, 1)
    assert tokenizer_fingerprint({"b": 1, "a": 0}, 0, 1) == fingerprint
    others = [tokenizer_fingerprint({"a": 1, "b": 0}, 0, 1), tokenizer_fingerprint({"a": 0, "b": 1}, None, 1)]
    others += [tokenizer_fingerprint({"a": 0, "b": 1, "c": 2}, 0, 1), tokenizer_fingerprint({"a": 0, "b": 1}, 0, 0)]
    assert len({fingerprint, *others}) == 5


def test_info_counts_added_tokens(byte_bpe: PreferenceTokenizer, pieces: PreferenceTokenizer) -> None:
    assert byte_bpe.info.vocab_size == len(byte_bpe.backend.vocabulary())
    assert (byte_bpe.info.bos_token_id, byte_bpe.info.eos_token_id) == (0, 1)
    assert (pieces.info.bos_token_id, pieces.info.eos_token_id) == (1, 2)


def test_plain_text_never_becomes_a_special_token(byte_bpe: PreferenceTokenizer, pieces: PreferenceTokenizer) -> None:
    for tokenizer, eos in ((byte_bpe, "<|end_of_text|>"), (pieces, "</s>")):
        (ids,) = tokenizer.backend.plain([f"a {eos} b"])
        assert tokenizer.info.eos_token_id not in ids
        assert tokenizer.decode_continuation(tokenizer.encode("x"), ids) == f"a {eos} b"
        assert tokenizer.info.eos_token_id in tokenizer.backend.continuation([f"a {eos} b"])[0]


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer"),
    [
        ({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "_"}, {"type": "Lowercase"}]}, None),
        (
            {"type": "Prepend", "prepend": "_"},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ),
        (None, {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": False}),
        (
            None,
            {
                "type": "Sequence",
                "pretokenizers": [{"type": "Metaspace", "replacement": "_", "prepend_scheme": "first", "split": True}],
            },
        ),
    ],
)
def test_a_continuation_gets_no_space_put_before_it(normalizer: object, pre_tokenizer: object) -> None:
    spec = {
        "version": "1.0",
        "truncation": {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": None,
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": {"_": 0, "a": 1, "b": 2, "u": 3}, "merges": [], "unk_token": "u"},
    }
    backend = HfBackend(json.dumps(spec))
    assert backend.first(["ab"]) == [[0, 1, 2]]
    assert backend.continuation(["ab"]) == [[1, 2]]


def test_a_model_that_drops_extra_spaces_keeps_the_one_at_the_boundary(tmp_path: Path) -> None:
    options = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    tokenizer = load_tokenizer(str(save_sentencepiece(tmp_path / "strict.model", **options)))
    _, with_space = tokenizer.encode_rendered("the sea,", " the river")
    _, without = tokenizer.encode_rendered("the sea,", "the river")
    assert with_space != without
    assert tokenizer.encode("the sea, the river") == [*tokenizer.encode("the sea,"), *with_space[:-1]]


def test_sentencepiece_control_pieces_start_a_segment_anew(pieces: PreferenceTokenizer) -> None:
    assert pieces.backend.first(["the sea</s>the river"]) == [[*pieces.encode("the sea"), 2, *pieces.encode("the river")]]
    assert pieces.backend.first(["", "</s>"]) == [[], [2]]


def test_a_tokenizer_travels_to_another_process(byte_bpe: PreferenceTokenizer, pieces: PreferenceTokenizer) -> None:
    for tokenizer in (byte_bpe, pieces):
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.info == tokenizer.info
        assert copy.encode("the sea") == tokenizer.encode("the sea")


def test_workers_need_neither_torch_nor_transformers() -> None:
    foreign = "{'torch', 'transformers', 'megatron'}"
    code = f"import sys, megatron_rmipo.data.preparing.workers; print(sorted({foreign} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert done.stdout.strip() == "[]"


def test_a_directory_with_one_sentencepiece_model_is_enough(sentencepiece_path: Path, pieces: PreferenceTokenizer) -> None:
    assert load_tokenizer(str(sentencepiece_path.parent)).info == pieces.info


def test_named_templates_need_a_default(tmp_path: Path) -> None:
    save_byte_bpe(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "x"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="tool_use and none named default"):
        load_tokenizer(str(tmp_path))


def test_what_is_no_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such tokenizer file or directory"):
        load_tokenizer(str(tmp_path / "absent"))
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match="not a sentencepiece model"):
        load_tokenizer(str(tmp_path / "x.model"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))


@pytest.mark.skipif(not shared_data().is_dir(), reason="no shared data")
def test_the_mistral_tokenizer_reproduces_the_authors_untruncated_ids() -> None:
    tokenizer = load_tokenizer(str(shared_data() / "tokenizers" / "mistral-v1.model"))
    rows = [
        json.loads(line) for line in (shared_data() / "official_tokenization" / "hh200_1024_512.jsonl").read_text().splitlines()
    ]
    for row in rows:  # none of these is truncated
        for name in ("chosen", "rejected"):
            ids = tokenizer.encode_rendered(row["text"]["prompt"], row["text"][name])
            assert ids == (row[f"{name}_prompt"], row[name])
