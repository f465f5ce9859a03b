"""A page of docs that is made of a template: filled, and written or compared."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def fill(template: Path, shown: Mapping[str, str]) -> str:
    """The template with what stands for each of its markers; every marker must have its text, and every text its place."""
    text = template.read_text(encoding="utf-8")
    assert sorted(re.findall(r"\{\{(\w+)\}\}", text)) == sorted(shown), "markers of the template"
    return re.sub(r"\{\{(\w+)\}\}", lambda match: shown[match[1]], text)


def write_or_compare(page: Path, render: Callable[[], str], argv: Sequence[str] | None, *, prog: str, stale: str) -> int:
    """The command of a page: exit code 0, or with ``--check`` 1 where the page is stale, which ``stale`` says."""
    parser = argparse.ArgumentParser(prog=prog, allow_abbrev=False, description=f"Write {page.name}, or compare it.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the page is stale")
    options = parser.parse_args(argv)
    text = render()
    if not options.check:
        page.write_text(text, encoding="utf-8")
        return 0
    if page.exists() and page.read_text(encoding="utf-8") == text:
        return 0
    print(f"{page}: {stale}", file=sys.stderr)
    return 1
