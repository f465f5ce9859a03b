"""docs/migrating.md against the parser: our flags and defaults as it says, and theirs answered in the same words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_rmipo.config.schema import Config
from megatron_rmipo.config.unknown_flags import _INSTEAD
from megatron_rmipo.objectives.arguments import parse_arguments
from megatron_rmipo.objectives.registry import OBJECTIVES

TEXT = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `--([\w-]+)` \| (.+?) \| (?:`--([\w-]+)`|-) \| (.+?) \| (.*?) ?\|$", TEXT, re.MULTILINE)
OPTIONS = {
    (objective, name): value
    for objective in OBJECTIVES
    for name, value in parse_arguments(["--objective", objective]).objective.options.items()
}


def test_every_row_of_the_tables_is_read() -> None:
    assert len(ROWS) == len([line for line in TEXT.splitlines() if line.startswith("| `")])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[2]}")
def test_a_row_says_what_the_parser_does(row: tuple[str, str, str, str, str]) -> None:
    theirs, _, ours, default, note = row
    flags = Config().to_flat_dict()
    key, their_key = ours.replace("-", "_"), theirs.replace("-", "_")
    if their_key not in flags and their_key not in {name for _, name in OPTIONS}:
        # What a user is told who types it here.
        answer = _INSTEAD[their_key]
        assert not ours or f"--{ours}" in answer or f"--{ours}" in note, answer
    if not ours:
        assert default == "-"
    elif key in flags:
        shown = {"-": None, "off": False}.get(default, default.strip("`"))
        assert str(flags[key]) == str(shown) or float(flags[key]) == float(str(shown)), flags[key]
    else:
        told = {objective: value for (objective, name), value in OPTIONS.items() if name == key}
        assert told, ours
        expected = [(value, objective) for value, objective in re.findall(r"([\d.]+) with `(\w+)`", note)]
        of_one = re.search(r"of `--objective (\w+)`", note)
        expected += [(default, of_one[1])] if of_one else []
        assert all(told[objective] == float(value) for value, objective in expected), told
