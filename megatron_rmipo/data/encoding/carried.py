"""The chat template that a data set hands on to the model: it writes at inference what stands in the data."""

from __future__ import annotations

from megatron_rmipo.data.encoding.chat import ChatTemplate
from megatron_rmipo.data.encoding.ends import EndOfTurn
from megatron_rmipo.data.encoding.jinja import compiled
from megatron_rmipo.data.encoding.tokenize import BOS_POLICIES, PreferenceTokenizer, with_one_bos, without_bos
from megatron_rmipo.data.store.chat_form import ChatForm

# Put before a template, with a line break that every reader of templates takes off behind a block.
_BOS_ONCE = "{{ bos_token }}{% set bos_token = '' %}\n"
_NO_BOS = "{% set bos_token = '' %}\n"


def chat_form(template: ChatTemplate, tokenizer: PreferenceTokenizer, *, official: bool) -> ChatForm | None:
    """The form of conversations that are encoded with a template.

    Args:
        template: it, with its ``--bos``.
        tokenizer: of the data.
        official: whether they are encoded by the authors' policy, which puts BOS and EOS by itself.

    Returns:
        None for texts that are rendered already.
    """
    if template.verbatim:
        return None
    bos = tokenizer.info.bos_token_id
    variables: dict[str, object] = {"tools": None, "documents": None, **template.special_tokens}
    variables |= {"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": True}

    def ids(source: str) -> list[int]:
        return tokenizer.backend.first([compiled(source, template.date, False)(variables)])[0]

    wanted = ids(template.source)
    if template.bos == "never":
        wanted = without_bos(wanted, bos)
    elif official or template.bos != BOS_POLICIES[0] or template.answer is not None:
        wanted = with_one_bos(wanted, bos)
    # A template that writes BOS as text, not as the variable, cannot be kept from it: it is carried as it is.
    prefix = next((prefix for prefix in ("", _BOS_ONCE, _NO_BOS) if ids(prefix + template.source) == wanted), "")
    tool_template = None if template.tool_source is None else prefix + template.tool_source
    end = tokenizer.info.eos_token_id if official else EndOfTurn(tokenizer, template).token
    return ChatForm(prefix + template.source, tool_template, end)
