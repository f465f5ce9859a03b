"""Typed access to the fields of a ``config.json``, whose errors name file, field and value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_rmipo.errors import ConversionError


class Fields:
    """The fields of a config, or of a mapping in it; what was read of them is remembered.

    Args:
        config: the mapping.
        defaults: what transformers assumes for fields a config may leave out.
        path: the file, for errors.
        within: the field that holds the mapping, with a dot behind it, where it is not the whole config.
    """

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, object], path: Path, within: str = "") -> None:
        self._config, self._defaults, self.path, self._within = config, defaults, path, within
        self.read: set[str] = set()

    def get(self, name: str) -> Any:
        """The value, or its default, or None."""
        self.read.add(name)
        return self._config[name] if name in self._config else self._defaults.get(name)

    def is_given(self, name: str) -> bool:
        """Whether the config itself holds a value."""
        return self._config.get(name) is not None

    def count(self, name: str) -> int:
        """A positive integer."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(name, f"must be a positive integer, found {value!r}")
        return value

    def flag(self, name: str) -> bool:
        """True or false; null is false."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.error(name, f"must be true or false, found {value!r}")
        return bool(value)

    def number(self, name: str) -> float:
        """A positive number."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.error(name, f"must be a positive number, found {value!r}")
        return float(value)

    def nonnegative(self, name: str) -> float:
        """Zero, or a positive number; null is zero."""
        return self.number(name) if self.get(name) else 0.0

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of positive numbers."""
        values = self.get(name)
        found = values if isinstance(values, list) else []
        if not found or any(isinstance(value, bool) or not isinstance(value, int | float) or value <= 0 for value in found):
            raise self.error(name, f"must be a list of positive numbers, found {values!r:.60}")
        return tuple(map(float, found))

    def one_of(self, name: str, allowed: Iterable[str]) -> str:
        """One of some names."""
        value, known = self.get(name), tuple(allowed)
        if value not in known:
            raise self.error(name, f"is {value!r}; supported are {', '.join(map(repr, known))}")
        return str(value)

    def mapping(self, name: str, defaults: Mapping[str, object] | None = None) -> Fields:
        """A mapping in the config; null is as absent, and empty where there is no default."""
        value = self.get(name)
        value = (self._defaults.get(name) if value is None else value) or {}
        if not isinstance(value, dict):
            raise self.error(name, f"must be a mapping, found {value!r}")
        return Fields(value, defaults or {}, self.path, f"{self._within}{name}.")

    def unread(self, harmless: Iterable[str]) -> dict[str, Any]:
        """The fields that nobody read and that ask for something: what is off (false, null, zero, empty) does not."""
        return {name: self._config[name] for name in self._config.keys() - self.read - set(harmless) if self._config[name]}

    def error(self, name: str, what: str) -> ConversionError:
        """The error that says ``what`` of the field ``name``."""
        return ConversionError(f"{self.path}: {self._within}{name} {what}.")
