"""Links of pages that leave docs/: the files they lead to stand on the site under repository/, pages as pages, sources as text.

So a link is written once, as it works in the repository.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

# Where files from outside of docs/ stand on the site.
PLACE = "repository/"
# Files that only the navigation leads to.
ALSO = ("CHANGELOG.md", "CONTRIBUTING.md")
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_CODE = re.compile(r"(^ {0,3}```.*?^ {0,3}```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def linked_files(docs: Path) -> dict[str, Path]:
    """Place on the site -> file, for every file outside of docs/ that a page leads to, by way of others, too."""
    root = docs.parent
    found = {PLACE + name: root / name for name in ALSO}
    waiting = [*docs.rglob("*.md"), *found.values()]
    while waiting:
        path = waiting.pop()
        for target in _targets(path, root):
            uri = PLACE + target.relative_to(root).as_posix()
            if uri not in found and not target.is_relative_to(docs):
                found[uri] = target
                waiting += [target] if target.suffix == ".md" else []
    return found


def _targets(path: Path, root: Path) -> Iterator[Path]:
    for part in _CODE.split(path.read_text(encoding="utf-8"))[::2]:
        for match in _LINK.finditer(part):
            target = Path(posixpath.normpath((path.parent / match[2]).as_posix()))
            if "://" not in match[2] and target.is_file() and target.is_relative_to(root):
                yield target


def site_links(markdown: str, uri: str, docs: Path) -> str:
    """A page's text with its links as the site has them.

    Args:
        markdown: of the page.
        uri: its place on the site.
        docs: the folder of the pages.
    """
    root = docs.parent
    source = root / uri.removeprefix(PLACE) if uri.startswith(PLACE) else docs / uri

    def moved(match: re.Match[str]) -> str:
        target = Path(posixpath.normpath((source.parent / match[2]).as_posix()))
        if "://" in match[2] or not target.is_relative_to(root):
            return match[0]
        inside = target.is_relative_to(docs)
        place = target.relative_to(docs).as_posix() if inside else PLACE + target.relative_to(root).as_posix()
        return match[1] + posixpath.relpath(place, posixpath.dirname(uri) or ".") + match[3]

    parts = _CODE.split(markdown)
    # Every other part is code.
    return "".join(part if number % 2 else _LINK.sub(moved, part) for number, part in enumerate(parts))
