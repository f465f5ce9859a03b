"""Rendering conversations with chat templates: the tokenizer's own, one from a file, or a built-in one."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError

from megatron_rmipo.data.encoding.jinja import DEFAULT_DATE, compiled, variables_read
from megatron_rmipo.data.encoding.templates import ANSWER_FORMS, BUILT_IN_TEMPLATES, NEEDED_TOKENS, AnswerForm
from megatron_rmipo.data.encoding.tokenize import BOS_POLICIES, PreferenceTokenizer
from megatron_rmipo.data.reading.rows import NOTHING, PreferencePair, RowFault, Turn, answer
from megatron_rmipo.errors import DataError

_PROBES = ("qzj", "xkv")  # letters no template writes itself
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_OURS = ("messages", "add_generation_prompt")  # not for a row to set


class Boundary(NamedTuple):
    """Where a template's prompt ends, beside the end of what it renders with a generation prompt.

    Attributes:
        cut: the end of the generation prompt that a plain answer in a finished conversation does not have behind the prompt, such
            as an opened ``<think>``. Where both answers of a row have it, it stays.
        added: the header of an answer, where a template writes none as a generation prompt.
    """

    cut: str = ""
    added: str = ""

    def apply(self, text: str) -> str:
        """The prompt, from its rendering with a generation prompt."""
        return text.removesuffix(self.cut) + self.added


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template with what it is given in every conversation.

    Attributes:
        name: ``tokenizer``, a built-in name, or a file's name.
        source: its Jinja text.
        special_tokens: variables of every conversation: ``bos_token`` and the like, ``date_string`` where a date was given.
        answer: how a built-in template writes an answer; None for others, whose conversations are rendered whole to see it.
        tool_source: the text that is used where a row has tools; None where that is ``source``, too.
        date: today, for templates that ask (YYYY-MM-DD).
        bos: one of ``BOS_POLICIES``: whether the prompt starts with BOS.
    """

    name: str
    source: str
    special_tokens: dict[str, str]
    answer: AnswerForm | None = None
    tool_source: str | None = None
    date: str = DEFAULT_DATE
    bos: str = BOS_POLICIES[0]
    _boundaries: dict[object, Boundary] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def title(self) -> str:
        """What messages call it."""
        return "the tokenizer's chat template" if self.name == "tokenizer" else f"the chat template {self.name}"

    @property
    def digest(self) -> str:
        """sha256 of the template's text."""
        return hashlib.sha256((self.source + (self.tool_source or "")).encode()).hexdigest()

    @property
    def verbatim(self) -> bool:
        """Whether texts are rendered already, so that special tokens in them are meant."""
        return self.name == "none"

    @functools.cached_property
    def variables_read(self) -> frozenset[str]:
        """Names of the variables it reads."""
        return variables_read(self.source) | variables_read(self.tool_source or "")

    @property
    def date_written(self) -> str:
        """The date that a conversation may show, empty where the template asks for none."""
        return self.date if "strftime_now" in self.variables_read or "date_string" in self.special_tokens else ""

    def render(self, turns: Sequence[Turn], variables: Mapping[str, Any] = NOTHING, *, add_generation_prompt: bool) -> str:
        """The conversation as text, as ``apply_chat_template`` of transformers gives it.

        Args:
            turns: its messages.
            variables: what the template is given beside them, such as ``tools``.
            add_generation_prompt: whether to write what stands before an answer.

        Raises:
            RowFault: the template refuses it.
        """
        return self._render(self._messages(turns), variables, add_generation_prompt)

    def _messages(self, turns: Sequence[Turn]) -> list[dict[str, Any]]:
        """Turns as the template reads them; reasoning under each of its names, as transformers hands it over."""
        messages = []
        for turn in turns:
            message: dict[str, Any] = {"role": turn.role, "content": turn.content}
            if turn.fields:
                message |= {name: value for name, value in turn.fields.items() if value is not None}
                if "tool_calls" in message and self._reads_arguments_as_text:
                    message["tool_calls"] = [_with_arguments_as_text(call) for call in message["tool_calls"]]
                reasoning = next((message[name] for name in REASONING_FIELDS if name in message), None)
                if reasoning is not None:
                    message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
            messages.append(message)
        return messages

    @functools.cached_property
    def _reads_arguments_as_text(self) -> bool:
        """Whether a call's arguments have to be JSON text: given a mapping, it fails or writes Python's notation of it.

        DeepSeek's templates are of this kind.
        """
        mapping, text = {"q": "x"}, '{"q": "x"}'
        rendered = []
        for arguments in (mapping, text):
            call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": arguments}}
            asked: dict[str, Any] = {"role": "user", "content": "x"}
            messages = [asked, {"role": "assistant", "content": "", "tool_calls": [call]}]
            try:
                rendered.append(self._render(messages, NOTHING, False))
            except RowFault:
                rendered.append("")
        return (not rendered[0] or str(mapping) in rendered[0]) and text in rendered[1]

    def _render(self, messages: list[dict[str, Any]], variables: Mapping[str, Any], add_generation_prompt: bool) -> str:
        source = self.source
        if variables:
            if taken := [name for name in _OURS if name in variables]:
                raise RowFault("template", "", f"{taken[0]} is not for a row to set; leave it out of chat_template_kwargs")
            if self.tool_source is not None and variables.get("tools") is not None:
                source = self.tool_source
        given = {"tools": None, "documents": None, **self.special_tokens, **variables}
        given |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return compiled(source, self.date, self.answer is not None)(given)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise RowFault("template", "prompt", f"{self.title} refuses the conversation: {error}") from None

    def render_prompt(self, prompt: Sequence[Turn], responses: Sequence[Turn], variables: Mapping[str, Any] = NOTHING) -> str:
        """The prompt up to where its answers start: that of :meth:`render_pair`.

        Raises:
            RowFault: the template refuses the conversation, or has no boundary.
        """
        messages = self._messages(prompt)
        text = self._render(messages, variables, True)
        if self.answer is not None:
            return text
        boundary = self._boundary(messages, variables, text)
        # Where there is something to cut, it is up to the answers whether it goes.
        return self.render_pair(prompt, responses, variables)[0] if boundary.cut else boundary.apply(text)

    def render_pair(
        self, prompt: Sequence[Turn], responses: Sequence[Turn], variables: Mapping[str, Any] = NOTHING
    ) -> tuple[str, list[str]]:
        """The prompt up to where the answer starts, and the text each response adds to it.

        Raises:
            RowFault: the template refuses the conversation, or renders the prompt otherwise once an answer follows.
        """
        messages = self._messages(prompt)
        text = self._render(messages, variables, True)
        if self.answer is not None:
            return text, [self.answer.render(response.content, self.special_tokens) for response in responses]
        wholes = [self._render([*messages, *self._messages((response,))], variables, False) for response in responses]
        for renew in (False, True):  # a boundary known from earlier rows may depend on what this one says
            boundary = self._boundary(messages, variables, text, renew=renew)
            # Answers may hold all of the generation prompt where plain ones do not: reasoning does behind an opened <think>.
            for prompt_text in (text + boundary.added, boundary.apply(text)):
                if all(whole.startswith(prompt_text) for whole in wholes):
                    return prompt_text, [whole[len(prompt_text) :] for whole in wholes]
        raise self._no_boundary(prompt_text, next(whole for whole in wholes if not whole.startswith(prompt_text)))

    def render_row(self, pair: PreferencePair) -> tuple[str, list[str]]:
        """:meth:`render_pair` of a row."""
        return self.render_pair(pair.prompt, tuple(pair.responses.values()), pair.variables)

    def _boundary(
        self, messages: list[dict[str, Any]], variables: Mapping[str, Any], text: str, *, renew: bool = False
    ) -> Boundary:
        """Where the prompt ends; known from earlier rows whose last role and switches were the same, unless ``renew``."""
        key = (messages[-1]["role"], *(sorted(switches(variables)) if variables else ()))
        known = self._boundaries.get(key)
        if known is None or renew or not text.endswith(known.cut):
            known = self._boundaries[key] = self._find_boundary(messages, variables, text)
        return known

    def _find_boundary(self, messages: list[dict[str, Any]], variables: Mapping[str, Any], text: str) -> Boundary:
        """The longest common beginning of the prompt with its generation prompt and of the conversation with any answer."""
        bare = self._render(messages, variables, False)
        wholes = [self._render([*messages, *self._messages((answer(probe),))], variables, False) for probe in _PROBES]
        finished = _common_beginning(*wholes)
        if finished.startswith(text):
            header = finished[len(text) :].rstrip(" ")  # a space is the answer's: tokens join it to the first word
            return Boundary(added=header if text == bare and header.strip() else "")
        shared = _common_beginning(text, finished)
        if len(shared) < len(_common_beginning(text, bare)):
            raise self._no_boundary(text, finished)
        return Boundary(cut=text[len(shared) :])

    def _no_boundary(self, text: str, whole: str) -> RowFault:
        start = len(_common_beginning(text, whole))
        was, becomes = (one[start : start + 40] for one in (text, whole))
        return RowFault(
            "template",
            "prompt",
            f"{self.title} renders the prompt differently once an answer follows, so that there is no boundary: "
            f"{was!r} becomes {becomes!r}",
        )

    @functools.cached_property
    def plain_boundary(self) -> Boundary:
        """That of a plain question."""
        if self.answer is not None:
            return Boundary()
        messages = self._messages((Turn("user", "x"),))
        return self._boundary(messages, NOTHING, self._render(messages, NOTHING, True))

    @property
    def notes(self) -> list[str]:
        """What a user should know who did not write it, a sentence each."""
        notes = []
        cut, added = self.plain_boundary
        if self.date_written:
            notes.append(f"the chat template writes today's date; these data have {self.date_written} (--template-date)")
        if cut:
            notes.append(
                f"the generation prompt ends with {cut!r}, which an answer of plain text does not go on from: its prompt ends "
                "before that, and what is trained is the answer as the template writes it in a conversation"
            )
        if added:
            notes.append(
                f"the chat template has no generation prompt: {added!r} belongs to the prompt, and has to be put behind it at "
                "inference, too"
            )
        return notes

    @functools.cached_property
    def closing(self) -> str:
        """What the template writes behind an answer."""
        _, (text,) = self.render_pair((Turn("user", "x"),), (answer(_PROBES[0]),))
        return text.rpartition(_PROBES[0])[2]


def _with_arguments_as_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _common_beginning(one: str, other: str) -> str:
    return one[: next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))]


def switches(variables: Mapping[str, Any]) -> list[tuple[str, object]]:
    """What may change the form of a conversation: which variables there are, and the values of yes, no and numbers."""
    return [(name, repr(value) if isinstance(value, bool | int) else "") for name, value in variables.items()]


def load_template(
    choice: str | None, tokenizer: PreferenceTokenizer, *, bos: str = BOS_POLICIES[0], date: str | None = None
) -> ChatTemplate:
    """The template of ``--chat-template``: None for the tokenizer's own, a built-in name, or a file.

    Args:
        choice: which.
        tokenizer: whose special tokens it may write.
        bos: one of ``BOS_POLICIES``.
        date: that of ``--template-date``; None for the default.

    Raises:
        DataError: there is none, it cannot be parsed, cannot render a plain question and answer, or does not fit the tokenizer;
            the date is none, or the template writes none.
    """
    special_tokens = tokenizer.spec.special_tokens
    if choice is None:
        if tokenizer.chat_template is None:
            raise DataError(
                f"{tokenizer.spec.name}: the tokenizer has no chat template.\n"
                f"Choose one with --chat-template: {', '.join(BUILT_IN_TEMPLATES)}, or a Jinja file."
            )
        tool_source = tokenizer.spec.tool_template
        template = ChatTemplate("tokenizer", tokenizer.chat_template, special_tokens, tool_source=tool_source, bos=bos)
    elif choice in BUILT_IN_TEMPLATES:
        special_tokens = {"bos_token": "", "eos_token": "", **special_tokens}
        template = ChatTemplate(choice, BUILT_IN_TEMPLATES[choice], special_tokens, ANSWER_FORMS[choice], bos=bos)
        missing = [token for token in NEEDED_TOKENS.get(choice, ()) if token not in tokenizer.backend.special_ids]
        if missing:
            raise DataError(
                f"--chat-template {choice}: the tokenizer {tokenizer.spec.name} has no {', '.join(missing)}; "
                "it would break them into pieces. Choose the template your model was made with."
            )
    else:
        template = ChatTemplate(Path(choice).name, _read_template(choice), special_tokens, bos=bos)
    _check(template)
    return template if date is None else _dated(template, date)


def _dated(template: ChatTemplate, date: str) -> ChatTemplate:
    """The template on another day: told to those that ask, and as ``date_string`` to those that have a day of their own."""
    try:
        day = datetime.date.fromisoformat(date)
    except ValueError:
        raise DataError(f"--template-date {date}: not a date of the form {DEFAULT_DATE}.") from None
    if "date_string" in template.variables_read:
        tokens = {**template.special_tokens, "date_string": day.strftime("%d %b %Y")}
        template = dataclasses.replace(template, special_tokens=tokens)
    elif "strftime_now" not in template.variables_read:
        raise DataError(f"--template-date {date}: {template.title} writes no date. Leave the flag out.")
    return dataclasses.replace(template, date=day.isoformat())


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
        _, (rendered,) = template.render_pair((Turn("user", "x"),), (answer(_PROBES[0]),))
    except RowFault as fault:
        raise DataError(f"--chat-template {template.name}: cannot render a plain question and answer. {fault.message}.") from None
    if _PROBES[0] not in rendered:
        raise DataError(f"--chat-template {template.name}: leaves out the assistant's answer (it wrote {rendered!r}).")
