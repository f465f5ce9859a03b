"""The navigation of mkdocs.yml, in which a pattern stands for all pages of docs/ that it matches and no other entry names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def expand(nav: list[Any], docs: Path) -> list[Any]:
    """The navigation without patterns.

    Args:
        nav: entries as YAML gives them: a page, {title: page}, or {title: entries}.
        docs: the folder that pages are named from.

    Returns:
        The same with the pages of each pattern in its place, in the order of their names, under the titles they have themselves.
    """
    named = {entry for entry in _pages(nav) if "*" not in entry}
    return _expanded(nav, docs, named)


def _pages(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        if isinstance(value, list):
            yield from _pages(value)
        else:
            yield value


def _expanded(nav: list[Any], docs: Path, named: set[str]) -> list[Any]:
    entries: list[Any] = []
    for entry in nav:
        if isinstance(entry, dict):
            ((title, value),) = entry.items()
            entries.append({title: _expanded(value, docs, named) if isinstance(value, list) else value})
        elif "*" in entry:
            entries += sorted({path.relative_to(docs).as_posix() for path in docs.glob(entry)} - named)
        else:
            entries.append(entry)
    return entries
