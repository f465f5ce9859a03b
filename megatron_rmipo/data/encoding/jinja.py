"""The Jinja that chat templates are written in: what transformers gives them, under the same names, and a clock that stands."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

DEFAULT_DATE = "2024-07-26"  # what Llama 3.1's own template writes where nobody tells it the date


class _GenerationBlock(Extension):
    """``{% generation %}`` marks the assistant's text in some templates; rendering passes it through."""

    tags = {"generation"}  # noqa: RUF012 - the name and form jinja2 asks for

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)  # a variable set inside ends with the block, as in transformers


@functools.cache
def _environment(trusted: bool) -> Environment:
    """The environment of chat templates; sandboxed unless trusted, since a template comes with a downloaded model."""
    kind = Environment if trusted else ImmutableSandboxedEnvironment
    environment = kind(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = tojson
    return environment


@functools.lru_cache(maxsize=16)
def compiled(source: str, date: str, trusted: bool) -> Callable[[dict[str, object]], str]:
    """A function that renders a template with variables by name.

    Args:
        source: the template's text.
        date: the day that ``strftime_now`` answers at any time (YYYY-MM-DD), so that the same data give the same ids tomorrow.
        trusted: the template is ours, and needs no sandbox.

    Raises:
        TemplateError: it cannot be parsed.
    """
    template = _environment(trusted).from_string(source)
    # Template.render would gather the globals anew each time, and that takes longer than to render a short conversation.
    shared, template.globals = {**template.globals, "strftime_now": datetime.date.fromisoformat(date).strftime}, {}

    def render(variables: dict[str, object]) -> str:
        return "".join(template.root_render_func(template.new_context({**shared, **variables}, shared=True)))

    return render


@functools.lru_cache(maxsize=16)
def variables_read(source: str) -> frozenset[str]:
    """Names of the variables a template reads without setting them first, globals such as ``strftime_now`` among them."""
    return frozenset(meta.find_undeclared_variables(_environment(False).parse(source)))


@functools.lru_cache(maxsize=16)
def literal_text(source: str) -> str:
    """All text a template can write of its own: outside of its tags, and in string constants; null characters between."""
    tree = _environment(False).parse(source)
    texts = [node.data for node in tree.find_all(nodes.TemplateData)]
    texts += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\0".join(texts)
