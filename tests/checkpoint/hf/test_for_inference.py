"""What an export has beside its weights, read by transformers as those who generate and train with it do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron_rmipo.checkpoint import convert
from megatron_rmipo.checkpoint.convert import convert_hf_to_megatron, convert_megatron_to_hf
from megatron_rmipo.checkpoint.hf.assets import copy_hf_assets
from megatron_rmipo.checkpoint.hf.for_inference import NOTHING_ELSE, Beside, own_templates
from megatron_rmipo.data.encoding.carried import chat_form
from megatron_rmipo.data.encoding.chat import load_template
from megatron_rmipo.data.encoding.encode import EncodedPair, LengthPolicy, PairEncoder
from megatron_rmipo.data.encoding.templates import BUILT_IN_TEMPLATES
from megatron_rmipo.data.encoding.tokenize import load_tokenizer
from megatron_rmipo.data.reading.rows import PreferencePair, Turn, answer
from megatron_rmipo.data.store.chat_form import ChatForm
from megatron_rmipo.errors import ConversionError
from tests.checkpoint.models import write_hf_model
from tests.data.tokenizers import save_byte_bpe

TURNS = (Turn("user", "Why?"), Turn("assistant", "So."), Turn("user", "And what then? "))
WRITES_BOS = "{{ bos_token }}{% for m in messages %}\n{{ m.role + ': ' + m.content }}\n{% endfor %}"


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("bos", ["template", "always", "never"])
@pytest.mark.parametrize("choice", [*(name for name in BUILT_IN_TEMPLATES if name != "none"), "own.jinja", "with_bos.jinja"])
def test_prompts_at_inference_are_those_of_the_data(tmp_path: Path, choice: str, bos: str) -> None:
    directory = save_byte_bpe(tmp_path / "model")
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.role }}\n{{ m.content + eos_token }}\n{% endfor %}")
    (tmp_path / "with_bos.jinja").write_text(WRITES_BOS)
    ours = load_tokenizer(str(directory))
    template = load_template(str(tmp_path / choice) if choice.endswith("jinja") else choice, ours, bos=bos)
    form = chat_form(template, ours, official=False)
    (encoded,) = PairEncoder(ours, template, LengthPolicy(400)).encode([PreferencePair(TURNS, answer("A"), answer("B"))])
    assert isinstance(encoded, EncodedPair)
    Beside(form).write(directory)

    theirs = AutoTokenizer.from_pretrained(directory)
    messages = [{"role": turn.role, "content": turn.content} for turn in TURNS]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == encoded.prompt[: len(ids)]
    assert theirs.decode(encoded.prompt[len(ids) :]).strip() in ("", "assistant:", "assistant")  # told as a note of the template
    ends = GenerationConfig.from_pretrained(directory).eos_token_id
    assert encoded.chosen[-1] in (ends if isinstance(ends, list) else [ends])
    assert theirs.eos_token_id in (ends if isinstance(ends, list) else [ends])


def test_texts_rendered_before_leave_the_template_alone(tmp_path: Path) -> None:
    directory = save_byte_bpe(tmp_path / "model")
    ours = load_tokenizer(str(directory))
    assert chat_form(load_template("none", ours), ours, official=False) is None


def test_a_directory_that_has_everything_stays_as_it_is_byte_for_byte(tmp_path: Path) -> None:
    directory = save_byte_bpe(tmp_path / "model")
    own = own_templates(directory)["default"]
    Beside(ChatForm(own, end_token_id=4)).write(directory)
    first = files_of(directory)
    Beside(ChatForm(own, end_token_id=4)).write(directory)
    NOTHING_ELSE.write(directory)
    assert files_of(directory) == first
    assert json.loads(first["tokenizer_config.json"])["chat_template"] == own, "the template was written anew"
    assert "chat_template.jinja" not in first


@pytest.mark.parametrize(
    ("fields", "special", "pad"),
    [
        ({}, (), "<|end_of_text|>"),
        ({"unk_token": "<|eot_id|>"}, (), "<|eot_id|>"),
        ({}, ("<|reserved_special_token_0|>",), "<|reserved_special_token_0|>"),
        ({}, ("<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"), "<|finetune_right_pad_id|>"),
        ({"pad_token": "<|end_of_text|>"}, ("<|pad|>",), "<|end_of_text|>"),
    ],
)
def test_the_pad_token_is_no_end_where_there_is_another(
    tmp_path: Path, fields: dict[str, str], special: tuple[str, ...], pad: str
) -> None:
    directory = save_byte_bpe(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(list(special), special_tokens=True)
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    fingerprint = load_tokenizer(str(directory)).info.fingerprint
    NOTHING_ELSE.write(directory)
    found = AutoTokenizer.from_pretrained(directory)
    assert found.pad_token == pad
    assert GenerationConfig.from_pretrained(directory).pad_token_id == found.pad_token_id
    assert load_tokenizer(str(directory)).info.fingerprint == fingerprint, "data prepared before would be refused"


def test_another_template_for_tools_goes_along_and_an_older_one_does_not(tmp_path: Path) -> None:
    directory = save_byte_bpe(tmp_path / "model")
    Beside(ChatForm("plain", "tools")).write(directory)
    assert AutoTokenizer.from_pretrained(directory).chat_template == {"default": "plain", "tool_use": "tools"}
    Beside(ChatForm("other")).write(directory)
    assert AutoTokenizer.from_pretrained(directory).chat_template == "other"


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    directory = save_byte_bpe(tmp_path / "model")
    (directory / "generation_config.json").write_text("{")
    with pytest.raises(ConversionError, match=r"generation_config\.json: not readable JSON"):
        NOTHING_ELSE.write(directory)


def test_a_checkpoint_hands_template_and_card_on_and_the_model_generates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_hf_model(tmp_path / "in", "llama31", vocab_size=640)
    shutil.copytree(save_byte_bpe(tmp_path / "tokenizer", chat_template=None), model, dirs_exist_ok=True)
    (model / "README.md").write_text("of another model")
    form = ChatForm("{{ bos_token }}{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}", None, 4)

    def as_a_run_does(source: Path, target: Path) -> None:
        copy_hf_assets(source, target)
        Beside(form, "# mine\n").write(target)

    monkeypatch.setattr(convert, "copy_hf_assets", as_a_run_does)
    convert_hf_to_megatron(model, tmp_path / "checkpoint")
    convert_megatron_to_hf(tmp_path / "checkpoint", tmp_path / "out", verify=False)
    assert (tmp_path / "out" / "README.md").read_text() == "# mine\n"

    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out", padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    chats = [[{"role": "user", "content": text}] for text in ("Hi", "Why does the river run to the sea?")]
    batch = tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt", return_dict=True)
    assert batch["attention_mask"].sum(dim=1).unique().numel() == 2, "nothing was padded"
    ids = policy.generate(**batch, do_sample=False, max_new_tokens=5)
    alone = tokenizer.apply_chat_template(chats[:1], return_tensors="pt", return_dict=True)
    lonely = policy.generate(**alone, do_sample=False, max_new_tokens=5)[0, alone["input_ids"].shape[1] :]
    assert ids[0, batch["input_ids"].shape[1] :].tolist()[: len(lonely)] == lonely.tolist()
    # What trl reads: the ids of generation, and a pad token in the tokenizer.
    assert sorted(policy.generation_config.eos_token_id) == [1, 2, 4]
    assert tokenizer.pad_token is not None
