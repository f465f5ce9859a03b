"""From a text on the command line, or a value of a YAML file, to the type a configuration field declares."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class ValueType:
    """The declared type of a field, taken apart.

    Attributes:
        base: bool, int, float or str.
        is_list: a list of ``base``.
        optional: None is allowed.
        choices: the values of a Literal, or empty.
    """

    base: type
    is_list: bool = False
    optional: bool = False
    choices: tuple[Any, ...] = ()

    @property
    def description(self) -> str:
        """What a value must be, for messages."""
        if self.choices:
            return "one of " + ", ".join(str(choice) for choice in self.choices)
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        return f"a list, each entry {names[self.base]}" if self.is_list else names[self.base]


def field_types(config_class: type) -> dict[str, ValueType]:
    """The value type of every flag of a dataclass, by field name (fields with ``metadata={"flag": False}`` left out).

    Raises:
        TypeError: a field has a type that no flag can have.
    """
    hints = typing.get_type_hints(config_class)
    fields = [field for field in dataclasses.fields(config_class) if field.metadata.get("flag", True) and field.init]
    return {field.name: _value_type(field.name, hints[field.name]) for field in fields}


def _value_type(name: str, hint: Any) -> ValueType:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        rest = [argument for argument in arguments if argument is not type(None)]
        if len(rest) == 1 and len(arguments) == 2:
            return dataclasses.replace(_value_type(name, rest[0]), optional=True)
        if set(rest) == {int, float}:
            return ValueType(float, optional=len(arguments) > 2)
    if origin is Literal:
        return ValueType(type(arguments[0]), choices=arguments)
    if origin is list:
        return dataclasses.replace(_value_type(name, arguments[0]), is_list=True)
    if hint in (bool, int, float, str):
        return ValueType(hint)
    raise TypeError(f"field {name}: a flag cannot have the type {hint}; use bool, int, float, str, a Literal or a list of one")


def convert(raw: object, kind: ValueType) -> Any:
    """The value of a flag or YAML entry as its field's type.

    Texts are read as the type wants them (YAML 1.1 takes ``6e-7`` for a text); nothing is rounded, and a bool is no number.

    Raises:
        ValueError: it cannot be read so; the message says what is wanted.
    """
    if raw is None:
        if kind.optional:
            return None
        raise ValueError(f"expected {kind.description}, found nothing")
    if kind.is_list:
        entries = raw if isinstance(raw, list) else [raw]
        # A weight of a blend is a number in YAML, a text on the command line.
        entries = [str(entry) if kind.base is str and isinstance(entry, int | float) else entry for entry in entries]
        return [convert(entry, dataclasses.replace(kind, is_list=False)) for entry in entries]
    value = _convert_scalar(raw, kind)
    if kind.choices and value not in kind.choices:
        raise ValueError(f"expected {kind.description}, found {raw!r}")
    return value


def _convert_scalar(raw: object, kind: ValueType) -> Any:
    problem = ValueError(f"expected {kind.description}, found {raw!r}")
    if kind.base is bool:
        known = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False, "1": True, "0": False}
        value = known.get(str(raw).lower())
        if value is None:
            raise problem
        return value
    if isinstance(raw, bool | list | dict):
        raise problem
    if kind.base is str:
        # An empty one is a variable of a script that was not set.
        if not isinstance(raw, str) or not raw:
            raise problem
        return raw
    if kind.base is int and isinstance(raw, float):
        raise problem
    try:
        number = kind.base(raw)
    except (TypeError, ValueError):
        raise problem from None
    if not math.isfinite(number):
        raise problem
    return number
