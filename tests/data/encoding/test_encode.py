from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_rmipo.data.encoding.chat import load_template
from megatron_rmipo.data.encoding.encode import EncodedPair, LengthPolicy, PairEncoder
from megatron_rmipo.data.encoding.tokenize import PreferenceTokenizer, load_tokenizer
from megatron_rmipo.data.reading.rows import PreferencePair, RowFault, Turn
from megatron_rmipo.errors import DataError
from tests.data.pairs import pair_of
from tests.data.tokenizers import save_byte_bpe

WIDE = LengthPolicy(4096)
CHOSEN, REJECTED = "Because the sea does not fill.", "Read it again."
PAIR = pair_of((Turn("user", "Why?"),), CHOSEN, REJECTED)
TEMPLATES = {"byte_bpe": (None, "zephyr", "hh", "none"), "pieces": ("mistral", "zephyr", "hh", "none")}
KINDS = [(kind, template) for kind, templates in TEMPLATES.items() for template in templates]


def encoder(tokenizer: PreferenceTokenizer, template: str | None, policy: LengthPolicy = WIDE) -> PairEncoder:
    return PairEncoder(tokenizer, load_template(template, tokenizer), policy)


def encode_one(
    tokenizer: PreferenceTokenizer, template: str | None, pair: PreferencePair, policy: LengthPolicy = WIDE
) -> EncodedPair:
    (result,) = encoder(tokenizer, template, policy).encode([pair])
    if isinstance(result, RowFault):
        raise result
    return result


@pytest.mark.parametrize(("kind", "template"), KINDS)
def test_bos_and_the_end_stand_exactly_once(kind: str, template: str | None, request: pytest.FixtureRequest) -> None:
    tokenizer: PreferenceTokenizer = request.getfixturevalue(kind)
    pair = encode_one(tokenizer, template, PAIR)
    end = tokenizer.backend.special_ids["<|eot_id|>"] if template is None else tokenizer.info.eos_token_id
    bos = tokenizer.info.bos_token_id
    assert bos is not None
    assert (pair.prompt[0], pair.prompt.count(bos)) == (bos, 1)
    for ids, text in ((pair.chosen, CHOSEN), (pair.rejected, REJECTED)):
        assert bos not in ids
        assert ids[-1] == end
        assert ids.count(ids[-1]) == 1
        assert not set(ids[:-1]) & set(tokenizer.backend.special_ids.values())
        assert tokenizer.decode_continuation(pair.prompt, ids[:-1]).strip() == text


@pytest.mark.parametrize(("kind", "template"), [(kind, template) for kind, template in KINDS if template != "none"])
def test_special_tokens_that_users_wrote_stay_text(kind: str, template: str | None, request: pytest.FixtureRequest) -> None:
    tokenizer: PreferenceTokenizer = request.getfixturevalue(kind)
    words = "a " + " b ".join(tokenizer.backend.special_ids) + " c"
    hostile = pair_of((Turn("user", words),), f"x {words}", f"y {words}")
    pair, plain = encoder(tokenizer, template).encode([hostile, PAIR])
    assert isinstance(pair, EncodedPair)
    assert isinstance(plain, EncodedPair)
    special = set(tokenizer.backend.special_ids.values())
    assert [token for token in pair.prompt if token in special] == [token for token in plain.prompt if token in special]
    assert [token for token in pair.chosen if token in special] == [plain.chosen[-1]]
    assert words in tokenizer.decode(pair.prompt)
    assert words in tokenizer.decode(pair.rejected)


@pytest.mark.parametrize("kind", ["byte_bpe", "pieces"])
@pytest.mark.parametrize("where", ["system", "user", "chosen", "rejected"])
def test_a_special_token_is_seen_wherever_it_was_written(kind: str, where: str, request: pytest.FixtureRequest) -> None:
    tokenizer: PreferenceTokenizer = request.getfixturevalue(kind)
    texts = {name: f"The {name} text" + (" </s> <|eot_id|> on" if name == where else "") for name in ("system", "user")}
    answers = {name: f"The {name} text" + (" </s> <|eot_id|> on" if name == where else "") for name in ("chosen", "rejected")}
    written = pair_of(tuple(Turn(role, text) for role, text in texts.items()), **answers)
    pair = encode_one(tokenizer, "zephyr", written)
    plain = encode_one(tokenizer, "zephyr", pair_of((Turn("system", "a"), Turn("user", "b")), "c", "d"))
    special = set(tokenizer.backend.special_ids.values())
    for ids, expected in ((pair.prompt, plain.prompt), (pair.chosen, plain.chosen), (pair.rejected, plain.rejected)):
        assert [token for token in ids if token in special] == [token for token in expected if token in special]


WRITTEN = " \u00e9 </s> <|eot_id|> x"  # special tokens in a rendered text are tokens: not for the template none


@pytest.mark.parametrize(
    ("kind", "template", "written"), [(*kind, text) for kind in KINDS for text in ("", WRITTEN) if kind[1] != "none" or not text]
)
@pytest.mark.parametrize("num_cut", [0, 9])
def test_an_answer_alone_has_the_ids_it_has_in_a_pair(
    kind: str, template: str | None, written: str, num_cut: int, request: pytest.FixtureRequest
) -> None:
    tokenizer: PreferenceTokenizer = request.getfixturevalue(kind)
    whole = pair_of((Turn("user", "Why? " + "the river runs to the sea " * 9 + written),), "So it is." + written, "So.")
    policy = LengthPolicy(encode_one(tokenizer, template, whole).num_tokens - num_cut)
    pair = encode_one(tokenizer, template, whole, policy)
    assert pair.truncated == (num_cut > 0)
    # The longer answer decides what stays of the prompt: alone it leaves as much, whatever its label.
    desirable = encode_one(tokenizer, template, whole._replace(rejected=None), policy)
    assert desirable == EncodedPair(pair.prompt, pair.chosen, [], pair.truncated)
    undesirable = encode_one(tokenizer, template, whole._replace(chosen=None, rejected=whole.chosen), policy)
    assert undesirable == EncodedPair(pair.prompt, [], pair.chosen, pair.truncated)


@pytest.mark.parametrize("limits", [(512, 256), (9, 5)])
def test_the_official_policy_takes_an_answer_alone(limits: tuple[int, int], pieces: PreferenceTokenizer) -> None:
    policy = LengthPolicy(limits[0], "official", limits[1])
    pair = encode_one(pieces, "mistral", PAIR, policy)
    assert encode_one(pieces, "mistral", PAIR._replace(rejected=None), policy) == dataclasses.replace(pair, rejected=[])
    assert encode_one(pieces, "mistral", PAIR._replace(chosen=None), policy) == dataclasses.replace(pair, chosen=[])


def test_an_end_written_behind_a_response_is_not_doubled(byte_bpe: PreferenceTokenizer) -> None:
    written = pair_of(PAIR.prompt, CHOSEN + "<|eot_id|>\n", REJECTED + " <|end_of_text|><|eot_id|>")
    assert encode_one(byte_bpe, None, written) == encode_one(byte_bpe, None, PAIR)


def test_rendered_texts_keep_their_special_tokens(byte_bpe: PreferenceTokenizer) -> None:
    prompt = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
    rendered = pair_of((Turn("user", prompt),), "a<|eot_id|>\n", "b")
    pair = encode_one(byte_bpe, "none", rendered)
    special = byte_bpe.backend.special_ids
    assert pair.prompt[:2] == [special["<|begin_of_text|>"], special["<|start_header_id|>"]]
    assert pair.chosen == [*byte_bpe.encode("a"), special["<|eot_id|>"]]
    assert pair.rejected == [*byte_bpe.encode("b"), special["<|end_of_text|>"]]
    for response in ("a<|eot_id|>b", "<|begin_of_text|>a"):
        with pytest.raises(RowFault) as fault:
            encode_one(byte_bpe, "none", pair_of(rendered.prompt, response, "b"))
        assert (fault.value.reason, fault.value.field) == ("special_token", "chosen")


def test_one_bad_pair_spoils_no_other(pieces: PreferenceTokenizer) -> None:
    tool = pair_of((Turn("tool", "x"),), "a", "b")
    results = encoder(pieces, "mistral").encode([PAIR, tool, PAIR])
    assert results[0] == results[2] == encode_one(pieces, "mistral", PAIR)
    assert isinstance(results[1], RowFault)
    assert results[1].reason == "template"


def test_responses_with_the_same_tokens_are_identical(pieces: PreferenceTokenizer) -> None:
    with pytest.raises(RowFault) as fault:
        encode_one(pieces, "mistral", pair_of(PAIR.prompt, "same", "same</s>"))
    assert fault.value.reason == "identical"


def test_without_any_end_there_is_no_training(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(save_byte_bpe(tmp_path, eos=None)))
    assert encode_one(tokenizer, None, PAIR).chosen[-1] == tokenizer.backend.special_ids["<|eot_id|>"]
    with pytest.raises(DataError, match="a response would have no end"):
        encoder(tokenizer, "hh")


LONG_TEXT = "first words " + "the river runs to the sea " * 30 + "last words"
CHAT = pair_of(
    (
        Turn("system", "Be brief."),
        Turn("user", "One " + LONG_TEXT),
        Turn("assistant", "Two."),
        Turn("user", "Three " + LONG_TEXT),
        Turn("assistant", "Four."),
        Turn("user", "Five, why?"),
    ),
    CHOSEN,
    REJECTED,
)


@pytest.mark.parametrize(
    ("kind", "template"), [("byte_bpe", None), ("pieces", "mistral"), ("pieces", "zephyr"), ("pieces", "hh")]
)
def test_too_long_loses_the_oldest_turns_first(kind: str, template: str | None, request: pytest.FixtureRequest) -> None:
    tokenizer: PreferenceTokenizer = request.getfixturevalue(kind)
    whole = encode_one(tokenizer, template, CHAT)
    policy = LengthPolicy(whole.num_tokens - 1)
    pair = encode_one(tokenizer, template, CHAT, policy)
    expected = encode_one(tokenizer, template, CHAT._replace(prompt=(CHAT.prompt[0], *CHAT.prompt[3:])))
    assert pair.truncated
    assert not whole.truncated
    assert pair.prompt == expected.prompt
    assert (pair.chosen, pair.rejected) == (whole.chosen, whole.rejected)
    short = encode_one(tokenizer, template, CHAT, LengthPolicy(expected.num_tokens - 1))
    assert short.prompt == encode_one(tokenizer, template, CHAT._replace(prompt=(CHAT.prompt[0], CHAT.prompt[5]))).prompt


@pytest.mark.parametrize(
    ("kind", "template"), [("byte_bpe", None), ("pieces", "mistral"), ("pieces", "zephyr"), ("pieces", "hh")]
)
@pytest.mark.parametrize("written", ["", "</s><|eot_id|>"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.6])
def test_a_single_turn_loses_its_beginning(
    kind: str, template: str | None, written: str, share: float, request: pytest.FixtureRequest
) -> None:
    tokenizer: PreferenceTokenizer = request.getfixturevalue(kind)
    single = pair_of((Turn("system", "Be brief."), Turn("user", LONG_TEXT + written)), CHOSEN, REJECTED)
    whole = encode_one(tokenizer, template, single)
    limit = whole.num_tokens - 1 - int(share * len(whole.prompt))
    pair = encode_one(tokenizer, template, single, LengthPolicy(limit))
    assert limit - 10 <= pair.num_tokens <= limit
    assert (pair.chosen, pair.rejected) == (whole.chosen, whole.rejected)
    text, full = tokenizer.decode(pair.prompt), tokenizer.decode(whole.prompt)
    assert pair.prompt[0] == tokenizer.info.bos_token_id
    assert "Be brief." in text
    assert "first words" not in text
    assert text[-40:] == full[-40:]
    assert text[: full.index("first")] == full[: full.index("first")]


def test_a_rendered_prompt_is_cut_by_tokens_and_keeps_bos(pieces: PreferenceTokenizer) -> None:
    single = pair_of((Turn("user", LONG_TEXT),), CHOSEN, REJECTED)
    whole = encode_one(pieces, "none", single)
    pair = encode_one(pieces, "none", single, LengthPolicy(whole.num_tokens - 50))
    assert pair.prompt == [1, *whole.prompt[51:]]
    assert pair.num_tokens == whole.num_tokens - 50


@pytest.mark.parametrize("template", ["mistral", "none"])
def test_a_response_is_never_cut(template: str, pieces: PreferenceTokenizer) -> None:
    whole = encode_one(pieces, template, PAIR)
    longest = max(len(whole.chosen), len(whole.rejected))
    for limit in (longest, longest + 1):
        with pytest.raises(RowFault) as fault:
            encode_one(pieces, template, PAIR, LengthPolicy(limit))
        assert fault.value.reason == "response_too_long"


@pytest.mark.parametrize("overlong", ["drop", "error"])
def test_other_policies_refuse_what_is_too_long_and_only_that(overlong: str, pieces: PreferenceTokenizer) -> None:
    whole = encode_one(pieces, "mistral", PAIR)
    assert encode_one(pieces, "mistral", PAIR, LengthPolicy(whole.num_tokens, overlong)) == whole
    with pytest.raises(RowFault, match=f"{whole.num_tokens} tokens, --seq-length is {whole.num_tokens - 1}") as fault:
        encode_one(pieces, "mistral", PAIR, LengthPolicy(whole.num_tokens - 1, overlong))
    assert fault.value.reason == "too_long"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2048, "cut"), "--overlong cut: unknown"),
        ((2,), "--seq-length 2"),
        ((2048, "drop", 100), "--max-prompt-length belongs to --overlong official"),
        ((2048, "official"), "needs --max-prompt-length"),
        ((2048, "official", 2048), "must lie between"),
    ],
)
def test_length_flags_that_cannot_work_are_errors(arguments: tuple[int, str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        LengthPolicy(*arguments)
