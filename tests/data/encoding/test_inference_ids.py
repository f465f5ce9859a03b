"""What is trained on is what the model will see: ids compared with those of transformers' ``apply_chat_template``."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from megatron_rmipo.data.encoding.chat import load_template
from megatron_rmipo.data.encoding.encode import EncodedPair, LengthPolicy, PairEncoder
from megatron_rmipo.data.encoding.jinja import DEFAULT_DATE
from megatron_rmipo.data.encoding.tokenize import PreferenceTokenizer, load_tokenizer
from megatron_rmipo.data.reading.rows import PreferencePair, RowFault, Turn, answer
from megatron_rmipo.errors import DataError
from tests.data.chat_templates import STYLES, Style, save_style

WHERE = Turn("user", "Weather in Oslo, and why?")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo \u00e9", "days": 2}}}
CALLED = Turn("assistant", "", {"tool_calls": [CALL]})
RESULT = Turn("tool", "4 C", {"name": "weather"})
THOUGHT = Turn("assistant", "So it is.", {"reasoning_content": "It is cold,\nso it is."})
WRITTEN = "say {0} <|im_end|> </s> [INST] <think> <tool_call> {0}"
CONVERSATIONS = {
    "turns": PreferencePair(
        (Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", "Hello."), Turn("user", "Why?")),
        answer("So it is."),
        answer("No idea."),
    ),
    "tools": PreferencePair(
        (WHERE, CALLED, RESULT),
        Turn("assistant", "Once more.", {"tool_calls": [CALL]}),
        answer("It is 4 C."),
        {"tools": [TOOL]},
    ),
    "reasoning": PreferencePair((Turn("user", "Hi"), THOUGHT, Turn("user", "Why?")), THOUGHT, answer("No.")),
    "written": PreferencePair(
        (Turn("user", WRITTEN), Turn("assistant", "It is {0}."), Turn("user", "Why {0}?")),
        answer("as {0} it"),
        answer("</s> No."),
    ),
    "edges": PreferencePair(
        (
            Turn("user", "\n \u00e9\u4e2d\U0001f600\u00a0 a\t\n"),
            Turn("assistant", "   "),
            Turn("user", " {{ x }} {% endfor %}  "),
        ),
        answer("  So\n\nit is.  "),
        answer("e\u0301\r\n"),
    ),
    "documents": PreferencePair(
        (Turn("user", "What does it say?"),), answer("So."), answer("No."), {"documents": [{"title": "A", "text": "The sea."}]}
    ),
}


class _Clock(datetime.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime.datetime:
        return datetime.datetime.fromisoformat(DEFAULT_DATE)


@pytest.fixture(scope="module", params=STYLES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(name of a style, transformers' tokenizer, ours, its encoder)."""
    directory: Path = tmp_path_factory.mktemp("style")
    theirs = save_style(STYLES[request.param], directory)
    ours = load_tokenizer(str(directory))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", _Clock)
        yield request.param, theirs, ours, PairEncoder(ours, load_template(None, ours), LengthPolicy(4096))


def needs(conversation: str) -> str | None:
    """What a template must show for a conversation."""
    if conversation == "turns":
        return "system"
    return conversation if conversation in ("tools", "reasoning", "documents") else None


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_ids_are_those_of_apply_chat_template(conversation: str, made: Any) -> None:
    name, theirs, ours, encoder = made
    style, pair = STYLES[name], CONVERSATIONS[conversation]
    if conversation == "written":
        pair = _filled(pair, style.end)
    (result,) = encoder.encode([pair])
    needed = needs(conversation)
    if needed is not None and needed not in style.shows:
        if needed != "system" or isinstance(result, RowFault):
            assert isinstance(result, RowFault), f"{name} cannot show {needed}"
            assert result.reason == "template"
        return
    assert isinstance(result, EncodedPair), f"{name}: {result}"
    options = {"sanitize_control_tokens": True} if conversation == "written" else {}
    prompt = _apply(theirs, pair.prompt, pair, True, **options)
    cut, added, closing = (
        theirs(text, add_special_tokens=False)["input_ids"] for text in (style.cut, style.added, style.closed_by)
    )
    assert result.prompt == [*prompt[: len(prompt) - len(cut)], *added], f"{name}: {ours.decode(result.prompt)!r}"
    ends = set(theirs.convert_tokens_to_ids([style.end, *style.further_ends]))
    for field, response in pair.responses.items():
        whole = [*_apply(theirs, (*pair.prompt, response), pair, False, **options), *closing]
        ids = getattr(result, field)
        if whole[: len(result.prompt)] != result.prompt:  # merged across the boundary, which a prompt alone has
            assert theirs.decode(whole).startswith(theirs.decode([*result.prompt, *ids]))
        else:
            assert [*result.prompt, *ids] == whole[: len(result.prompt) + len(ids)], f"{name}: {ours.decode(ids)!r}"
        assert [token for token in ids if token in ends] == [ids[-1]]


def _apply(
    theirs: PreTrainedTokenizerFast, turns: tuple[Turn, ...], pair: PreferencePair, generate: bool, **options: Any
) -> list[int]:
    messages = [{"role": turn.role, "content": turn.content, **turn.fields} for turn in turns]
    for message in messages:  # gpt-oss has another name for it
        message |= {"thinking": message["reasoning_content"]} if "reasoning_content" in message else {}
    ids: list[int] = theirs.apply_chat_template(
        messages,
        add_generation_prompt=generate,
        tokenize=True,
        return_dict=False,
        **pair.variables,
        **options,
    )
    return ids


def _filled(pair: PreferencePair, end: str) -> PreferencePair:
    turns = [turn._replace(content=turn.content.replace("{0}", end)) for turn in (*pair.prompt, *pair.responses.values())]
    return pair._replace(prompt=tuple(turns[:-2]), chosen=turns[-2], rejected=turns[-1])


def _encode(encoder: PairEncoder, pair: PreferencePair) -> EncodedPair | RowFault:
    (result,) = encoder.encode([pair])
    return result


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreferenceTokenizer, PairEncoder]:
    directory = tmp_path_factory.mktemp("qwen3")
    save_style(STYLES["qwen3"], directory)
    tokenizer = load_tokenizer(str(directory))
    return tokenizer, PairEncoder(tokenizer, load_template(None, tokenizer), LengthPolicy(4096))


def test_reasoning_of_earlier_turns_may_be_left_out_and_is_counted(qwen3: tuple[PreferenceTokenizer, PairEncoder]) -> None:
    pair = CONVERSATIONS["reasoning"]
    result = _encode(qwen3[1], pair)
    assert isinstance(result, EncodedPair)
    assert result.left_out
    assert qwen3[0].decode(result.chosen) == "<think>\nIt is cold,\nso it is.\n</think>\n\nSo it is.<|im_end|>"
    fresh = _encode(qwen3[1], pair._replace(prompt=pair.prompt[2:]))
    assert isinstance(fresh, EncodedPair)
    assert not fresh.left_out


@pytest.mark.parametrize(("system", "switch"), [("Be brief. /no_think", None), ("Be brief.", False), ("Be brief.", True)])
def test_a_reasoning_mode_is_that_of_the_system_turn_or_the_switch(system: str, switch: bool | None, tmp_path: Path) -> None:
    theirs = save_style(STYLES["smollm3"], tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    variables = {} if switch is None else {"enable_thinking": switch}
    pair = PreferencePair((Turn("system", system), Turn("user", "Why?")), answer("So."), answer("No."), variables)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", _Clock)
        result = _encode(PairEncoder(tokenizer, load_template(None, tokenizer), LengthPolicy(4096)), pair)
        assert isinstance(result, EncodedPair)
        assert result.prompt == _apply(theirs, pair.prompt, pair, True)
        whole = _apply(theirs, (*pair.prompt, pair.responses["chosen"]), pair, False)
        assert [*result.prompt, *result.chosen] == whole[: len(result.prompt) + len(result.chosen)]
    assert tokenizer.decode(result.prompt).endswith("assistant\n" if switch else "assistant\n<think>\n\n</think>\n")


def test_what_the_model_writes_itself_is_its_token_in_an_answer_alone(qwen3: tuple[PreferenceTokenizer, PairEncoder]) -> None:
    tokenizer, encoder = qwen3
    text = "<think>\nso\n</think>\n\nyes"
    result = _encode(encoder, PreferencePair((Turn("user", text),), answer(text), answer("no")))
    assert isinstance(result, EncodedPair)
    thinks = {tokenizer.backend.added_ids["<think>"], tokenizer.backend.added_ids["</think>"]}
    assert thinks.isdisjoint(result.prompt)
    assert thinks <= set(result.chosen)
    assert tokenizer.decode(result.chosen) == text + "<|im_end|>"


@pytest.mark.parametrize("limit", [4096, 40])
def test_answers_that_go_on_from_an_opened_think_keep_the_whole_generation_prompt(limit: int, tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' and '<think>' not in m.content and '</think>' not in m.content %}"
        "{{ '<think>\n' + m.reasoning_content + '</think>' if m.reasoning_content else '<think></think>' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    )
    style = Style(source, None, "<|im_end|>", "<|im_end|>", ("<|im_start|>",), ("<think>", "</think>"))
    theirs = save_style(style, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    encoder = PairEncoder(tokenizer, load_template(None, tokenizer), LengthPolicy(limit))
    thought = answer("Yes.")._replace(fields={"reasoning_content": "So."})
    both = PreferencePair((Turn("user", "Why is that, and what of the sea? " * 4),), thought, THOUGHT)
    written = both._replace(chosen=answer("<think>\nSo.</think>Yes."), rejected=answer("<think>\nNever.</think>No."))
    for pair, cut in ((both, 0), (written, 0), (both._replace(rejected=answer("No.")), 1)):
        result = _encode(encoder, pair)
        assert isinstance(result, EncodedPair)
        assert (result.truncated, result.left_out) == (limit == 40, False)
        opened = theirs("<|im_start|>assistant\n<think>\n", add_special_tokens=False)["input_ids"]
        expected = opened[: len(opened) - cut]
        assert result.prompt[-len(expected) :] == expected
        assert tokenizer.decode(result.chosen) == "\n" * cut + "So.</think>Yes.<|im_end|>"
        if limit == 4096:
            assert result.prompt == _apply(theirs, pair.prompt, pair, True)[: len(result.prompt)]


@pytest.mark.parametrize(
    ("change", "field", "left_out"),
    [
        ({"variables": {"documents": [{"title": "A", "text": "b"}]}}, "documents", "documents"),
        ({"variables": {"enable_thinking": False}}, "enable_thinking", "enable_thinking"),
        ({"chosen": Turn("assistant", "So.", {"refusal": "no"})}, "chosen", "refusal"),
        ({"prompt": (Turn("user", "Hi"), Turn("observer", "Look."), Turn("user", "Why?"))}, "prompt", "content"),
        ({"prompt": (Turn("user", "Hi"), Turn("user", "Why?", {"tool_calls": [CALL]}))}, "prompt", "tool_calls"),
    ],
)
def test_what_a_template_leaves_out_is_refused(
    change: dict[str, Any], field: str, left_out: str, qwen3: tuple[PreferenceTokenizer, PairEncoder]
) -> None:
    pair = PreferencePair((Turn("user", "Why?"),), answer("So."), answer("No."))
    assert isinstance(_encode(qwen3[1], pair), EncodedPair)
    fault = _encode(qwen3[1], pair._replace(**change))
    assert isinstance(fault, RowFault)
    assert (fault.reason, fault.field) == ("template", field)
    problem, _, remedy = fault.message.partition("; --ignore-columns ")
    assert problem.endswith(left_out)
    assert bool(remedy) == (left_out not in ("content", "tool_calls"))


def test_a_call_that_is_not_shown_is_refused_though_another_is(tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.tool_calls %}"
        "{{ m.tool_calls[0].function | tojson }}{% endif %}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    save_style(Style(source, "<s>", "</s>", "</s>"), tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    encoder = PairEncoder(tokenizer, load_template(None, tokenizer), LengthPolicy(4096))
    calls = [Turn("assistant", "", {"tool_calls": [CALL] * count}) for count in (1, 2)]
    shown, cut = (_encode(encoder, PreferencePair((WHERE,), call, answer("No."))) for call in calls)
    assert isinstance(shown, EncodedPair)
    assert isinstance(cut, RowFault)
    assert cut.message == "the tokenizer's chat template leaves out the answer's tool_calls"


@pytest.mark.parametrize("written", ["'' + m.tool_calls[0].function.arguments", "m.tool_calls[0].function.arguments"])
def test_a_template_that_reads_arguments_as_text_is_given_json(written: str, tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }} {{ "
        + written
        + " }}{% endif %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    theirs = save_style(Style(source, "<s>", "</s>", "</s>"), tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    encoder = PairEncoder(tokenizer, load_template(None, tokenizer), LengthPolicy(4096))
    pair = PreferencePair((WHERE, CALLED, RESULT), Turn("assistant", "Again: ", {"tool_calls": [CALL]}), answer("It is 4 C."))
    result = _encode(encoder, pair)
    assert isinstance(result, EncodedPair)
    text = '{"city": "Oslo \u00e9", "days": 2}'
    in_text = {"tool_calls": [{**CALL, "function": {"name": "weather", "arguments": text}}]}
    turns = (WHERE, CALLED._replace(fields=in_text), RESULT, Turn("assistant", "Again: ", in_text))
    assert [*result.prompt, *result.chosen] == _apply(theirs, turns, pair, False)
    assert f"weather {text}</s>" in tokenizer.decode(result.chosen)


@pytest.mark.parametrize("name", ["llama3", "zephyr", "hh", "none"])
def test_the_built_in_templates_refuse_what_they_do_not_know(name: str, byte_bpe: PreferenceTokenizer) -> None:
    encoder = PairEncoder(byte_bpe, load_template(name, byte_bpe), LengthPolicy(4096))
    plain = PreferencePair((Turn("user", "Why?"),), answer("So."), answer("No."))
    for pair in (plain._replace(variables={"tools": [TOOL]}), plain._replace(rejected=CALLED), plain._replace(chosen=THOUGHT)):
        fault = _encode(encoder, pair)
        assert isinstance(fault, RowFault)
        assert fault.reason == "template"


@pytest.mark.parametrize(("bos", "count"), [("template", 0), ("always", 1), ("never", 0)])
def test_bos_is_what_the_template_has_unless_asked_otherwise(bos: str, count: int, tmp_path: Path) -> None:
    for name in ("chatml", "gemma"):  # which write none, and one
        save_style(STYLES[name], tmp_path / name)
        tokenizer = load_tokenizer(str(tmp_path / name))
        result = _encode(
            PairEncoder(tokenizer, load_template(None, tokenizer, bos=bos), LengthPolicy(4096)), CONVERSATIONS["edges"]
        )
        assert isinstance(result, EncodedPair)
        expected = max(count, int(name == "gemma" and bos == "template"))
        assert result.prompt.count(tokenizer.info.bos_token_id) == expected  # type: ignore[arg-type]


def test_a_date_is_told_once_and_only_to_templates_that_write_one(tmp_path: Path) -> None:
    made = {}
    for name in ("smollm3", "llama3.1", "chatml"):
        save_style(STYLES[name], tmp_path / name)
        made[name] = load_tokenizer(str(tmp_path / name))
    question = (Turn("user", "Why?"),)
    assert "Today: 26 July 2024" in load_template(None, made["smollm3"]).render(question, add_generation_prompt=True)
    smollm3, llama3 = (load_template(None, made[name], date="2025-01-02") for name in ("smollm3", "llama3.1"))
    assert "Today: 02 January 2025" in smollm3.render(question, add_generation_prompt=True)
    assert "Today Date: 02 Jan 2025" in llama3.render(question, add_generation_prompt=True)
    assert [load_template(None, made[name]).date_written for name in made] == ["2024-07-26", "", ""]
    assert (smollm3.date_written, llama3.date_written) == ("2025-01-02", "2025-01-02")
    with pytest.raises(DataError, match="writes no date"):
        load_template(None, made["chatml"], date="2025-01-02")
    with pytest.raises(DataError, match="--template-date 2025-13-02: not a date"):
        load_template(None, made["smollm3"], date="2025-13-02")


@pytest.mark.parametrize("special", [False, True])
def test_a_token_that_the_template_acts_upon_is_left_to_it_unless_it_bounds_turns(special: bool, tmp_path: Path) -> None:
    shown = "m.content.split('</think>')[-1]"
    source = STYLES["r1-distill"].source.replace(shown, shown + ".split('<|eos|>')[0]")
    thinks = ("<think>", "</think>")
    style = dataclasses.replace(
        STYLES["r1-distill"],
        source=source,
        special=thinks if special else (),
        ordinary=("<|User|>", *(() if special else thinks)),
    )
    save_style(style, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    encoder = PairEncoder(tokenizer, load_template(None, tokenizer), LengthPolicy(4096))
    pair = PreferencePair((Turn("user", "Why <|User|>?"),), answer("<think>so</think>yes"), answer("no"))
    result = _encode(encoder, pair)
    assert isinstance(result, EncodedPair)
    assert result.left_out
    assert tokenizer.decode(result.chosen) == "yes<|eos|>"
    assert result.prompt.count(tokenizer.backend.added_ids["<|User|>"]) == 1
    fault = _encode(encoder, pair._replace(chosen=answer("so <|eos|> yes")))
    assert isinstance(fault, RowFault)
    assert (fault.reason, fault.message) == ("special_token", "the tokenizer's chat template acts upon <|eos|> in the row's text")
