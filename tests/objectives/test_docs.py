"""Every objective has a page with its options as they are, the index lists all of them, and the program tells the same."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rmipo.objectives.__main__ import default_in_words, main
from megatron_rmipo.objectives.registry import OBJECTIVES

DOCS = Path(__file__).parents[2] / "docs"
HEADER = "| option | default | meaning |"


def options_of(page: str) -> dict[str, str]:
    """Option -> default of the page's table of options; one without must say so."""
    if HEADER not in page:
        assert re.search(r"^No options\.", page, re.MULTILINE)
        return {}
    assert page.count(HEADER) == 1
    rows = page.split(HEADER, 1)[1].strip().split("\n\n", 1)[0].splitlines()[1:]
    cells = [[cell.strip().strip("`") for cell in row.split("|")[1:4]] for row in rows]
    assert all(len(row) == 3 and row[2] for row in cells), cells
    assert len({row[0] for row in cells}) == len(cells)
    return {row[0]: row[1] for row in cells}


def options_in_code(name: str) -> dict[str, str]:
    config = OBJECTIVES[name]().config
    return {option: default_in_words(config, option) for option in type(config).__dataclass_fields__}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_page_names_the_options_and_their_defaults(name: str) -> None:
    page = (DOCS / "objectives" / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {name}\n")
    assert options_of(page) == options_in_code(name)
    assert "Passes:" in page


@pytest.mark.parametrize("path", sorted((DOCS / "objectives").glob("*.md")), ids=lambda path: path.stem)
def test_pages_name_only_what_exists(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert page.isascii()
    assert all((path.parent / link).exists() for link in re.findall(r"\]\(([\w./-]+)\)", page))
    assert path.stem in OBJECTIVES
    known = {option for name in OBJECTIVES for option in options_in_code(name)}
    # Flags of the trainer that a page may point to.
    known |= {"clip_grad", "objective"}
    flags = {flag.replace("-", "_") for flag in re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*)", page)}
    assert {flag.removeprefix("no_") for flag in flags} <= known


def test_the_reader_of_tables_sees_what_is_wrong() -> None:
    table = f"# a\n\n{HEADER}\n|---|---|---|\n| `beta` | 0.1 | x |\n| `on` | `off` | y |\n\nmore | text |\n"
    assert options_of(table) == {"beta": "0.1", "on": "off"}
    for broken in (table.replace("| x |", "| |"), table.replace("`on`", "`beta`"), "# a\n", table + table):
        with pytest.raises(AssertionError):
            options_of(broken)


def test_the_index_lists_every_objective_in_order() -> None:
    index = (DOCS / "objectives.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .* \| .+ \| \[(\w+)\]\(objectives/(\w+)\.md\) \|$", index, re.MULTILINE)
    assert [row[0] for row in rows] == list(OBJECTIVES)
    assert all(len(set(row)) == 1 for row in rows)


def test_the_program_lists_every_objective(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = [line.split(None, 1) for line in capsys.readouterr().out.splitlines()[1:]]
    needs = dict(lines)
    assert list(needs) == list(OBJECTIVES)
    assert needs["rmipo"] == "log p(y), context bos"
    assert needs["simpo"] == "-"
    assert needs["dpo"] == "reference"
    assert needs["sft"] == "the chosen responses alone"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_program_explains_every_objective(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main([name]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{name}: ")
    assert "needs: " in text
    for option, default in options_in_code(name).items():
        assert re.search(rf"^--{option.replace('_', '-')} +{re.escape(default)} +\S", text, re.MULTILINE), option
    if not options_in_code(name):
        assert text.endswith("no options\n")


def test_the_program_refuses_an_unknown_name_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simpoo"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ConfigError: unknown objective 'simpoo'; did you mean 'simpo'?")
    assert captured.err.count("\n") == 1
    assert main(["tests.objectives.test_docs:DOCS"]) == 1
    assert "not a subclass" in capsys.readouterr().err


def test_the_program_starts_as_a_module_and_takes_ones_own() -> None:
    command = [sys.executable, "-m", "megatron_rmipo.objectives", "megatron_rmipo.objectives.infopo:Infopo"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=DOCS.parent, check=False)
    assert done.returncode == 0, done.stderr
    assert "derived from the abstract of the paper alone" in done.stdout
