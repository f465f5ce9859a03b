from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_rmipo.data.encoding.chat import ChatTemplate, load_template
from megatron_rmipo.data.encoding.templates import BUILT_IN_TEMPLATES
from megatron_rmipo.data.encoding.tokenize import PreferenceTokenizer
from megatron_rmipo.data.reading.rows import RowFault, Turn, answer
from megatron_rmipo.errors import DataError

CHAT = (Turn("system", "Be brief. "), Turn("user", " Hi"), Turn("assistant", "Hello."), Turn("user", "Why? "))

RENDERED = {
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "So.<|eot_id|>",
    ),
    "mistral": ("[INST] Be brief.\n\n Hi [/INST] Hello. </s>[INST] Why? [/INST]", " So. </s>"),
    "zephyr": (
        "<|system|>\nBe brief. </s>\n<|user|>\n Hi</s>\n<|assistant|>\nHello.</s>\n<|user|>\nWhy? </s>\n<|assistant|>\n",
        " So. </s>\n",
    ),
    "hh": ("Be brief.\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:", " So."),
}


def built_in(name: str) -> ChatTemplate:
    from megatron_rmipo.data.encoding.templates import ANSWER_FORMS

    return ChatTemplate(
        name, BUILT_IN_TEMPLATES[name], {"bos_token": "<|begin_of_text|>", "eos_token": "</s>"}, ANSWER_FORMS[name]
    )


@pytest.mark.parametrize("name", RENDERED)
def test_built_in_templates(name: str) -> None:
    prompt, (response,) = built_in(name).render_pair(CHAT, [answer(" So. ")])
    assert (prompt, response) == RENDERED[name]


@pytest.mark.parametrize("name", BUILT_IN_TEMPLATES)
@pytest.mark.parametrize("text", ["So.", "  So.\n\n", "a\nb ", "</s>"])
def test_the_short_way_to_an_answer_equals_rendering_the_whole_conversation(name: str, text: str) -> None:
    turns = CHAT[1:2] if name == "none" else CHAT
    quick = built_in(name)
    whole = dataclasses.replace(quick, answer=None)
    assert quick.render_pair(turns, [answer(text)]) == whole.render_pair(turns, [answer(text)])
    assert quick.closing == whole.closing


def test_none_takes_the_text_as_it_is_and_one_turn_alone() -> None:
    assert built_in("none").render_pair((Turn("user", " <s>x "),), [answer(" y ")]) == (" <s>x ", [" y "])
    with pytest.raises(RowFault, match="several turns or a system turn"):
        built_in("none").render_pair(CHAT, [answer("y")])


def test_what_a_template_refuses_is_a_fault() -> None:
    source = "{% if messages | length > 2 %}{{ raise_exception('at most two turns') }}{% endif %}{{ messages[-1]['content'] }}"
    with pytest.raises(RowFault, match="at most two turns") as fault:
        ChatTemplate("t", source, {}).render(CHAT, add_generation_prompt=True)
    assert fault.value.reason == "template"


def test_a_prompt_that_changes_once_answered_has_no_boundary() -> None:
    source = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(RowFault, match=r"renders the prompt differently once an answer follows, .*: '\d\D.*' becomes '\d\D"):
        ChatTemplate("t", source, {}).render_pair(CHAT, [answer("x")])
    headed = "{% for m in messages %}[{{ m['role'] }}{{ m['x'] }}]{{ m['content'] }}{% endfor %}"  # no generation prompt
    named = Turn("assistant", "y", {"x": "!"})
    with pytest.raises(RowFault, match=r": '\]' becomes '!\]y'"):
        ChatTemplate("t", headed, {}).render_pair((Turn("user", "q"),), [named])


def test_templates_get_what_they_are_written_for_and_no_more() -> None:
    source = (
        "{% if tools is none %}no tools {% endif %}"
        "{% for m in messages %}\n{% if loop.index > 1 %}{% break %}{% endif %}\n"
        "{% generation %}{{ m['content'] | tojson }}{% endgeneration %}{% endfor %}"
    )
    assert (
        ChatTemplate("t", source, {}).render((Turn("user", "\u00e9<b>"),), add_generation_prompt=False) == 'no tools "\u00e9<b>"'
    )
    hostile = ChatTemplate("t", "{{ messages.__class__.__mro__ }}", {})
    with pytest.raises(RowFault, match="unsafe"):
        hostile.render(CHAT, add_generation_prompt=False)


def test_the_template_is_the_tokenizers_own_unless_another_is_chosen(byte_bpe: PreferenceTokenizer, tmp_path: Path) -> None:
    own = load_template(None, byte_bpe)
    assert (own.name, own.source) == ("tokenizer", byte_bpe.chat_template)
    assert load_template("llama3", byte_bpe).render_pair(CHAT, [answer("So.")]) == own.render_pair(CHAT, [answer("So.")])
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    mine = load_template(str(file), byte_bpe)
    assert mine.render_pair(CHAT[:1], [answer("b")]) == (
        "<Be brief. ><",
        ["b>"],
    )  # without a generation prompt the header is the prompt's
    assert len({own.digest, mine.digest}) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for %}", "cannot render a plain question and answer"),
        (" \n", "holds no template"),
        ("{{ 'constant' }}", "leaves out the assistant's answer"),
        ("{{ raise_exception('never') }}", "never"),
    ],
)
def test_a_template_file_that_cannot_work_is_an_error(
    text: str, message: str, byte_bpe: PreferenceTokenizer, tmp_path: Path
) -> None:
    (tmp_path / "bad.jinja").write_text(text)
    with pytest.raises(DataError, match=message):
        load_template(str(tmp_path / "bad.jinja"), byte_bpe)


def test_a_missing_template_is_an_error(pieces: PreferenceTokenizer) -> None:
    with pytest.raises(DataError, match=r"no chat template.\n.*--chat-template: llama3, mistral, zephyr, hh, none"):
        load_template(None, pieces)
    with pytest.raises(DataError, match=r"--chat-template lama3: not a readable file \(No such file"):
        load_template("lama3", pieces)
    with pytest.raises(DataError, match=r"no <\|start_header_id\|>, <\|end_header_id\|>, <\|eot_id\|>"):
        load_template("llama3", pieces)
