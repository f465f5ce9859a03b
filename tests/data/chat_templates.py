"""Chat templates in the style of the families people train, and tokenizers that fit them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.data.tokenizers import TEXTS


@dataclasses.dataclass(frozen=True)
class Style:
    """A template, its tokens, and what it can show.

    Attributes:
        source: its Jinja text.
        bos, eos: of the tokenizer.
        end: with which an answer ends.
        further_ends: with what else the model ends turns, by its generation config.
        special, ordinary: further added tokens, marked special or not.
        cut: what its generation prompt has and no finished conversation.
        added: the header it writes before an answer, and not as a generation prompt.
        closed_by: what stands behind an answer that it leaves open, and no conversation of its has.
        shows: of ``tools``, ``reasoning``, ``documents``, ``system`` those it shows.
    """

    source: str
    bos: str | None
    eos: str
    end: str
    special: tuple[str, ...] = ()
    ordinary: tuple[str, ...] = ()
    further_ends: tuple[str, ...] = ()
    cut: str = ""
    added: str = ""
    closed_by: str = ""
    shows: frozenset[str] = frozenset({"system"})


def _shows(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CHATML_TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
_CHATML_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_CHATML_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + (messages[0].content + '\n' if messages[0].role == 'system' else '') }}"
    "{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}"
)
_CHATML_CALLS = (
    "{% for call in m.tool_calls or [] %}{{ '\n<tool_call>\n' }}"
    "{{ '{\"name\": \"' + call.function.name + '\", \"arguments\": ' + call.function.arguments | tojson + '}' }}"
    "{{ '\n</tool_call>' }}{% endfor %}"
)
_CHATML_RESULT = "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
_IM = ("<|im_start|>", "<|im_end|>")
_TOOL_MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_THINK_MARKS = ("<think>", "</think>")

STYLES = {
    "chatml": Style(
        "{% for m in messages %}" + _CHATML_TURN + "{% endfor %}" + _CHATML_PROMPT, "<s>", "</s>", "<|im_end|>", (), _IM
    ),
    "no-prompt": Style(
        "{% for m in messages %}" + _CHATML_TURN + "{% endfor %}",
        None,
        "<|im_end|>",
        "<|im_end|>",
        _IM,
        added="<|im_start|>assistant\n",
    ),
    "qwen2.5": Style(
        _CHATML_TOOLS + "{% for m in messages %}{% if m.role == 'tool' %}" + _CHATML_RESULT + "{% elif m.role == 'assistant' %}"
        "{{ '<|im_start|>assistant' + ('\n' + m.content if m.content else '') }}" + _CHATML_CALLS + "{{ '<|im_end|>\n' }}"
        "{% elif m.role == 'user' %}" + _CHATML_TURN + "{% endif %}{% endfor %}" + _CHATML_PROMPT,
        None,
        "<|im_end|>",
        "<|im_end|>",
        ("<|endoftext|>", *_IM),
        _TOOL_MARKS,
        shows=_shows("system tools"),
    ),
    "qwen3": Style(
        _CHATML_TOOLS + "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'tool' %}"
        + _CHATML_RESULT
        + ""
        "{% elif m.role == 'assistant' %}{% set content = m.content %}{% set thought = '' %}"
        "{% if m.reasoning_content is string %}"
        "{% set thought = m.reasoning_content %}{% elif '</think>' in content %}"
        "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
        "{% if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
        "{{ content }}" + _CHATML_CALLS + "{{ '<|im_end|>\n' }}{% elif m.role == 'user' %}" + _CHATML_TURN + "{% endif %}"
        "{% endfor %}" + _CHATML_PROMPT,
        None,
        "<|im_end|>",
        "<|im_end|>",
        ("<|endoftext|>", *_IM),
        (*_TOOL_MARKS, *_THINK_MARKS),
        shows=_shows("system tools reasoning"),
    ),
    "llama3.1": Style(
        "{{ bos_token }}{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
        "{% set asked = namespace(system='') %}{% if messages[0].role == 'system' %}"
        "{% set asked.system = messages[0].content | trim %}"
        "{% endif %}{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}{% if tools is not none %}"
        "{{ 'Environment: ipython\n' }}"
        "{% for tool in tools %}{{ tool | tojson(indent=4) + '\n\n' }}{% endfor %}{% endif %}"
        "{{ 'Today Date: ' + date_string + '\n\n' + asked.system + '<|eot_id|>' }}"
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% elif m.tool_calls %}"
        "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
        "{% set call = m.tool_calls[0].function %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' + m.content }}"
        "{{ '<|python_tag|>{\"name\": \"' + call.name + '\", \"parameters\": ' + call.arguments | tojson + '}<|eom_id|>' }}"
        "{% elif m.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content | tojson + '<|eot_id|>' }}"
        "{% else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>"),
        further_ends=("<|eom_id|>",),
        shows=_shows("system tools"),
    ),
    "mistral-v1": Style(
        "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}"
        "{{ ' ' + m.content + eos_token }}{% endif %}"
        "{% endfor %}",
        "<s>",
        "</s>",
        "</s>",
        shows=frozenset(),
    ),
    "mistral-v3": Style(
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{{ bos_token }}"
        "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% if tools is not none and m == asked[-1] %}"
        "{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
        "{{ '[INST] ' + (system + '\n\n' if system and m == asked[-1] else '') + m.content + '[/INST]' }}"
        "{% elif m.tool_calls %}{{ ' ' + m.content + '[TOOL_CALLS] ' }}{% for call in m.tool_calls %}"
        "{{ call.function | tojson }}{% endfor %}{{ eos_token }}{% elif m.role == 'assistant' %}"
        "{{ ' ' + m.content | trim + eos_token }}"
        "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + {'content': m.content} | tojson + '[/TOOL_RESULTS]' }}{% endif %}"
        "{% endfor %}",
        "<s>",
        "</s>",
        "</s>",
        ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        shows=_shows("system tools"),
    ),
    "mistral-v7": Style(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
        "{% elif m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}{% elif m.role == 'assistant' %}"
        "{{ m.content + eos_token }}{% else %}{{ raise_exception('only system, user and assistant') }}{% endif %}{% endfor %}",
        "<s>",
        "</s>",
        "</s>",
        ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    ),
    "zephyr": Style(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "<s>",
        "</s>",
        "</s>",
    ),
    "gemma": Style(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        "{% for m in messages %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
        "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<bos>",
        "<eos>",
        "<end_of_turn>",
        ("<start_of_turn>", "<end_of_turn>"),
        ("\n\n",),
        shows=frozenset(),
    ),
    "r1-distill": Style(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
        "{{ '<|User|>' + m.content }}{% elif m.role == 'assistant' %}"
        "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
        "<|bos|>",
        "<|eos|>",
        "<|eos|>",
        (),
        ("<|User|>", "<|Assistant|>", *_THINK_MARKS),
        cut="<think>\n",
    ),
    "phi3": Style(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        "<s>",
        "<|endoftext|>",
        "<|end|>",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"),
    ),
    "command-r": Style(
        "{{ bos_token }}{% if documents %}{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' }}{% for d in documents %}"
        "{{ 'Document ' + loop.index0 | string + '\n' + d.title + '\n' + d.text + '\n' }}{% endfor %}"
        "{{ '<|END_OF_TURN_TOKEN|>' }}"
        "{% endif %}{% for m in messages %}"
        "{{ '<|START_OF_TURN_TOKEN|>' + {'system': '<|SYSTEM_TOKEN|>', 'user': '<|USER_TOKEN|>',"
        " 'assistant': '<|CHATBOT_TOKEN|>'}[m.role] + m.content + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
        "<BOS_TOKEN>",
        "<|END_OF_TURN_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        ("<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        shows=_shows("system documents"),
    ),
    "olmo": Style(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% if not loop.last %}"
        "{{ '<|assistant|>\n' + m.content + eos_token + '\n' }}{% else %}"
        "{{ '<|assistant|>\n' + m.content + eos_token }}{% endif %}"
        "{% else %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "<|endoftext|>",
        "<|endoftext|>",
        "<|endoftext|>",
    ),
    "smollm3": Style(
        "{% set ns = namespace(system='Be helpful.', mode='/think' if enable_thinking is not defined or enable_thinking"
        " else '/no_think') %}{% if messages[0].role == 'system' %}{% set ns.system = messages[0].content %}"
        "{% if '/no_think' in ns.system %}{% set ns.mode = '/no_think' %}{% endif %}"
        "{% set ns.system = ns.system.replace('/no_think', '').replace('/think', '').rstrip() %}{% endif %}"
        "{{ '<|im_start|>system\n## Metadata\n\nToday: ' + strftime_now('%d %B %Y') + '\nReasoning Mode: ' + ns.mode }}"
        "{{ '\n\n## Custom Instructions\n\n' + ns.system + '<|im_end|>\n' }}"
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ '<|im_start|>assistant\n' + ('' if ns.mode == '/think' else '<think>\n\n</think>\n') }}"
        "{{ m.content.lstrip('\n') + '<|im_end|>\n' }}{% endgeneration %}{% else %}" + _CHATML_TURN + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' + ('' if ns.mode == '/think' else '<think>\n\n</think>\n') }}{% endif %}",
        "<|begin_of_text|>",
        "<|im_end|>",
        "<|im_end|>",
        _IM,
        _THINK_MARKS,
    ),
    "phi4": Style(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
        "<|endoftext|>",
        "<|im_end|>",
        "<|im_end|>",
        (*_IM, "<|im_sep|>"),
    ),
    "phi4-mini": Style(
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
        "{% if m.role == 'system' and tools %}{{ '<|tool|>' + tools | tojson + '<|/tool|>' }}{% endif %}{{ '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}",
        "<|endoftext|>",
        "<|endoftext|>",
        "<|end|>",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>", "<|/tool|>"),
    ),
    "granite": Style(
        "{% set given = messages[0].role == 'system' %}{{ '<|start_of_role|>system<|end_of_role|>' }}"
        "{{ messages[0].content if given else 'Today: ' + strftime_now('%B %d, %Y') + '.' }}{{ '<|end_of_text|>\n' }}"
        "{% if tools %}{{ '<|start_of_role|>tools<|end_of_role|>' + tools | tojson(indent=4) + '<|end_of_text|>\n' }}{% endif %}"
        "{% for m in (messages[1:] if given else messages) %}{{ '<|start_of_role|>' }}"
        "{{ 'tool_response' if m.role == 'tool' else m.role }}{{ '<|end_of_role|>' + m.content }}"
        "{% if m.tool_calls %}{{ '<|tool_call|>' + m.tool_calls | map(attribute='function') | list | tojson }}{% endif %}"
        "{{ '<|end_of_text|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}",
        "<|end_of_text|>",
        "<|end_of_text|>",
        "<|end_of_text|>",
        ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        shows=_shows("system tools"),
    ),
    "gpt-oss": Style(
        "{{ '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '\n\nReasoning: medium<|end|>' }}"
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ '<|start|>developer<|message|># Instructions\n\n' + m.content + '<|end|>' }}{% elif m.role == 'user' %}"
        "{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}{% elif m.role == 'assistant' %}"
        "{% set last = loop.last and not add_generation_prompt %}{% if last and m.thinking %}"
        "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if last else '<|end|>') }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        "<|startoftext|>",
        "<|return|>",
        "<|return|>",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>"),
        further_ends=("<|call|>",),
        shows=_shows("system reasoning"),
    ),
    "glm4": Style(
        "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        None,
        "<|endoftext|>",
        "<|endoftext|>",
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        further_ends=("<|user|>", "<|observation|>"),
        closed_by="<|endoftext|>",
    ),
}


def save_style(style: Style, directory: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the tokens of a style, saved as a Hugging Face directory."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False))
    named = {"eos_token": style.eos} | ({"bos_token": style.bos} if style.bos else {})
    tokenizer.add_special_tokens([*named.values(), *style.special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in style.ordinary])
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=style.source, **named)
    whole.save_pretrained(directory)
    ends = whole.convert_tokens_to_ids([style.end, *style.further_ends])
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return whole
