r"""Built-in chat templates, in the Jinja dialect of Hugging Face tokenizers.

- ``llama3``: Llama 3's headers and ``<|eot_id|>``.
- ``mistral``: ``[INST] ... [/INST] answer </s>`` as the RMiPO and SimPO authors render it for Mistral (with a space before
  ``</s>``); a system turn is put before the first user turn.
- ``zephyr``: ``<|user|>`` lines, each turn ended by EOS, as used for Mistral-7B and Llama-3 base models.
- ``hh``: Anthropic's ``\n\nHuman: ...\n\nAssistant:`` transcripts.
- ``none``: the text as it is: one user turn, nothing added but BOS and EOS; special tokens in the text are recognised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class AnswerForm:
    """What a template adds to a rendered prompt for an answer: ``opening + answer + closing``, the answer stripped or not.

    The same text as rendering the whole conversation, without doing so for each response.
    """

    opening: str = ""
    closing: str = ""
    strip: bool = True

    def render(self, answer: str, special_tokens: Mapping[str, str]) -> str:
        """The answer's text; ``{eos_token}`` in the closing is filled in."""
        closing = self.closing.replace("{eos_token}", special_tokens["eos_token"])
        return self.opening + (answer.strip() if self.strip else answer) + closing


_LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

_MISTRAL = (
    "{% set state = namespace(system='') %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set state.system = message['content'] | trim + '\n\n' %}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' + (state.system + message['content']) | trim + ' [/INST]' }}"
    "{% set state.system = '' %}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('the mistral template has no ' + message['role'] + ' turns') }}"
    "{% endif %}"
    "{% endfor %}"
)

_ZEPHYR = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

_HH = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] | trim }}"
    "{% elif message['role'] == 'user' %}{{ '\n\nHuman: ' + message['content'] | trim }}"
    "{% elif message['role'] == 'assistant' %}{{ '\n\nAssistant: ' + message['content'] | trim }}"
    "{% else %}{{ raise_exception('the hh template has no ' + message['role'] + ' turns') }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)

_NONE = (
    "{% if messages[0]['role'] != 'user' or messages | length > 2 %}"
    "{{ raise_exception('the none template takes one prompt text, this conversation has several turns or a system turn') }}"
    "{% endif %}"
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
)

BUILT_IN_TEMPLATES = {"llama3": _LLAMA3, "mistral": _MISTRAL, "zephyr": _ZEPHYR, "hh": _HH, "none": _NONE}
ANSWER_FORMS = {
    "llama3": AnswerForm(closing="<|eot_id|>"),
    "mistral": AnswerForm(opening=" ", closing=" {eos_token}"),
    "zephyr": AnswerForm(closing="{eos_token}\n", strip=False),
    "hh": AnswerForm(opening=" "),
    "none": AnswerForm(strip=False),
}
# Special tokens a built-in template writes: a tokenizer without them would break each into pieces of text.
NEEDED_TOKENS = {"llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")}
