"""How prompts of a data set are written and its answers ended: what a tokenizer needs to do the same at inference."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple, Protocol


@dataclasses.dataclass(frozen=True)
class ChatForm:
    """The form that conversations of a data set have.

    Attributes:
        template: a chat template in the Jinja dialect of Hugging Face tokenizers, which writes BOS where the data have it.
        tool_template: another one for conversations with tools; None where that is ``template``, too.
        end_token_id: with which an answer ends.
    """

    template: str
    tool_template: str | None = None
    end_token_id: int | None = None


class Prepared(Protocol):
    """The manifest of a data set."""

    @property
    def chat(self) -> ChatForm | None:
        """None where texts were taken as they are, or the manifest is too old to know."""

    @property
    def template_name(self) -> str:
        """What the template is called."""


class CarriedForm(NamedTuple):
    """What a model trained on data sets gets with it.

    Attributes:
        form: None leaves the tokenizer's own template.
        notes: what a user should know of it, a sentence each.
    """

    form: ChatForm | None
    notes: list[str]


def carried_form(data: Iterable[tuple[str, Prepared]]) -> CarriedForm:
    """The form that a model trained on data sets gets with it.

    That of the first data set that has one; the others are told of where theirs differ.

    Args:
        data: (prefix, manifest) of each, in the order of the flags.
    """
    data = list(dict(data).items())
    carried = next(((prefix, manifest.chat) for prefix, manifest in data if manifest.chat is not None), None)
    notes = [
        f"{prefix} was prepared by an earlier version, which did not keep its chat template ({manifest.template_name}): exports "
        "go without it. Prepare the data again for that."
        for prefix, manifest in data
        if manifest.chat is None and manifest.template_name not in ("", "none", "tokenizer")
    ]
    if carried is None:
        return CarriedForm(None, notes)
    first, form = carried
    others = [prefix for prefix, manifest in data if manifest.chat not in (None, form)]
    if others:
        notes.append(f"the chat template of {', '.join(others)} is another than that of {first}, which an export carries")
    return CarriedForm(form, notes)
