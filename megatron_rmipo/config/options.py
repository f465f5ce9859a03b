"""How a field of the configuration says its default and its help."""

from __future__ import annotations

import dataclasses
from typing import Any


def described(text: str, metavar: str | None = None) -> dict[str, str | None]:
    """The metadata of a field that is a flag: its help, and what its value is called there."""
    return {"help": text, "metavar": metavar}


def option(default: Any, text: str, metavar: str | None = None) -> Any:
    """A field that is a flag, with its default."""
    return dataclasses.field(default=default, metadata=described(text, metavar))
