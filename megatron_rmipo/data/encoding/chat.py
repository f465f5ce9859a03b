"""Rendering conversations with chat templates: the tokenizer's own, one from a file, or a built-in one."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_rmipo.data.encoding.templates import ANSWER_FORMS, BUILT_IN_TEMPLATES, NEEDED_TOKENS, AnswerForm
from megatron_rmipo.data.encoding.tokenize import PreferenceTokenizer
from megatron_rmipo.data.reading.rows import NOTHING, RowFault, Turn, answer
from megatron_rmipo.errors import DataError

_PROBE = "qzj"  # letters no template writes itself


class _GenerationBlock(Extension):
    """``{% generation %}`` marks the assistant's text in some templates; rendering passes it through."""

    tags = {"generation"}  # noqa: RUF012 - the name and form jinja2 asks for

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


@functools.cache
def _environment(trusted: bool) -> Environment:
    """The environment chat templates are written for; sandboxed unless trusted, since a template comes with a downloaded model.

    ``strftime_now`` is left out on purpose: templates then write a fixed date, and the same data gives the same ids tomorrow.
    """
    kind = Environment if trusted else ImmutableSandboxedEnvironment
    environment = kind(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: object, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = tojson
    return environment


@functools.lru_cache(maxsize=8)
def _compiled(source: str, trusted: bool) -> Callable[..., str]:
    template = _environment(trusted).from_string(source)
    # Template.render would gather the globals anew each time, and that takes longer than to render a short conversation.
    shared, template.globals = dict(template.globals), {}

    def render(**variables: object) -> str:
        return "".join(template.root_render_func(template.new_context({**shared, **variables}, shared=True)))

    return render


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template with the special tokens it may write.

    Attributes:
        name: ``tokenizer``, a built-in name, or a file's name.
        source: its Jinja text.
        special_tokens: variables such as ``bos_token``.
        answer: how a built-in template writes an answer; None for others, whose conversations are rendered whole to see it.
    """

    name: str
    source: str
    special_tokens: dict[str, str]
    answer: AnswerForm | None = None

    @property
    def digest(self) -> str:
        """sha256 of the template's text."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    @property
    def verbatim(self) -> bool:
        """Whether texts are rendered already, so that special tokens in them are meant."""
        return self.name == "none"

    def render(self, turns: Sequence[Turn], variables: Mapping[str, Any] = NOTHING, *, add_generation_prompt: bool) -> str:
        """The conversation as text.

        Args:
            turns: its messages.
            variables: what the template is given beside them, such as ``tools``.
            add_generation_prompt: whether to write what stands before an answer.

        Raises:
            RowFault: the template refuses it.
        """
        return self._render(_messages(turns), variables, add_generation_prompt)

    def _render(self, messages: list[dict[str, Any]], variables: Mapping[str, Any], add_generation_prompt: bool) -> str:
        given = {"tools": None, "documents": None, **self.special_tokens, **variables}
        try:
            return _compiled(self.source, self.answer is not None)(
                **given, messages=messages, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise RowFault("template", "prompt", f"the chat template {self.name} refuses the conversation: {error}") from None

    def render_pair(
        self, prompt: Sequence[Turn], responses: Sequence[Turn], variables: Mapping[str, Any] = NOTHING
    ) -> tuple[str, list[str]]:
        """The prompt up to where the answer starts, and the text each response adds to it.

        Raises:
            RowFault: the template refuses the conversation, or renders the prompt otherwise once an answer follows.
        """
        messages = _messages(prompt)
        prompt_text = self._render(messages, variables, True)
        if self.answer is not None:
            return prompt_text, [self.answer.render(response.content, self.special_tokens) for response in responses]
        response_texts = []
        for response in responses:
            whole = self._render([*messages, *_messages((response,))], variables, False)
            if not whole.startswith(prompt_text):
                raise RowFault(
                    "template",
                    "prompt",
                    f"the chat template {self.name} renders the prompt differently once an answer follows: there is no boundary",
                )
            response_texts.append(whole[len(prompt_text) :])
        return prompt_text, response_texts

    @functools.cached_property
    def closing(self) -> str:
        """What the template writes behind an answer."""
        _, (text,) = self.render_pair((Turn("user", "x"),), (answer(_PROBE),))
        return text.rpartition(_PROBE)[2]


def _messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    return [{"role": turn.role, "content": turn.content, **turn.fields} for turn in turns]


def load_template(choice: str | None, tokenizer: PreferenceTokenizer) -> ChatTemplate:
    """The template of ``--chat-template``: None for the tokenizer's own, a built-in name, or a file.

    Raises:
        DataError: there is none, it cannot be parsed, cannot render a plain question and answer, or does not fit the tokenizer.
    """
    special_tokens = tokenizer.spec.special_tokens
    if choice is None:
        if tokenizer.chat_template is None:
            raise DataError(
                f"{tokenizer.spec.name}: the tokenizer has no chat template.\n"
                f"Choose one with --chat-template: {', '.join(BUILT_IN_TEMPLATES)}, or a Jinja file."
            )
        template = ChatTemplate("tokenizer", tokenizer.chat_template, special_tokens)
    elif choice in BUILT_IN_TEMPLATES:
        special_tokens = {"bos_token": "", "eos_token": "", **special_tokens}
        template = ChatTemplate(choice, BUILT_IN_TEMPLATES[choice], special_tokens, ANSWER_FORMS[choice])
        missing = [token for token in NEEDED_TOKENS.get(choice, ()) if token not in tokenizer.backend.special_ids]
        if missing:
            raise DataError(
                f"--chat-template {choice}: the tokenizer {tokenizer.spec.name} has no {', '.join(missing)}; "
                "it would break them into pieces. Choose the template your model was made with."
            )
    else:
        template = ChatTemplate(Path(choice).name, _read_template(choice), special_tokens)
    _check(template)
    return template


def _read_template(choice: str) -> str:
    path = Path(choice).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DataError(
            f"--chat-template {choice}: not a readable file ({reason}), and none of {', '.join(BUILT_IN_TEMPLATES)}."
        ) from None
    if path.suffix == ".json":
        fields: Any = json.loads(text) if text.lstrip().startswith("{") else None
        text = fields.get("chat_template", "") if isinstance(fields, dict) else ""
    if not text.strip():
        raise DataError(f"--chat-template {choice}: holds no template.")
    return text


def _check(template: ChatTemplate) -> None:
    try:
        _, (rendered,) = template.render_pair((Turn("user", "x"),), (answer(_PROBE),))
    except RowFault as fault:
        raise DataError(f"--chat-template {template.name}: cannot render a plain question and answer. {fault.message}.") from None
    if _PROBE not in rendered:
        raise DataError(f"--chat-template {template.name}: leaves out the assistant's answer (it wrote {rendered!r}).")
