"""The site: its tables are those of the programs, its pages lead where they say, and it is built without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from docs_site.links import PLACE, linked_files, site_links
from docs_site.navigation import expand
from docs_site.parsers import groups_of, parser_that_answers, tool_parsers, trainer_parser
from docs_site.tables import TABLES, fill_in, prose
from megatron_rmipo.config.parsing import parse_fields
from megatron_rmipo.config.schema import Config, TrainingConfig
from megatron_rmipo.config.values import field_types
from megatron_rmipo.families.registry import FAMILIES
from megatron_rmipo.families.unbuilt import UNBUILT
from megatron_rmipo.objectives.registry import OBJECTIVES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_the_trainers_flags_are_all_there_once() -> None:
    text = TABLES["trainer_flags"]()
    shown = re.findall(r"^\| `--(?:\[no-\])?([a-z][a-z0-9-]*)", text, re.MULTILINE)
    sections = [type(section) for section in vars(Config()).values()]
    options = {option for objective in OBJECTIVES.values() for option in field_types(objective.Config)}
    expected = ["config", "print_config", *(name for section in sections for name in field_types(section))]
    assert shown == [name.replace("_", "-") for name in expected]
    assert not options & {name.replace("-", "_") for name in shown}
    assert re.search(r"^\| `--lr` `FLOAT` \| `6e-07` \| Peak learning rate; ", text, re.MULTILINE)
    assert re.search(r"^\| `--\[no-\]bf16` \| `off` \| ", text, re.MULTILINE)
    assert "## Optimizer and learning-rate schedule" in text


def test_every_tool_has_its_flags() -> None:
    parsers = dict(tool_parsers())
    assert list(parsers) == sorted(path.name for path in (ROOT / "tools").glob("*.py"))
    for name, parser in parsers.items():
        shown = {key for _, flags in groups_of(parser) for key in (flag.key for flag in flags)}
        assert shown == {action.dest for action in parser._actions if action.dest != "help"}, name
    text = TABLES["tool_flags"]()
    assert re.findall(r"^## (\S+)$", text, re.MULTILINE) == list(parsers)
    assert re.search(r"^\| `--output-prefix` `PREFIX` \| required \| ", text, re.MULTILINE)


def test_the_parser_is_the_one_that_answers_help() -> None:
    parser = parser_that_answers(lambda argv: parse_fields(argv, {TrainingConfig: ("epochs", "seed")}, "x.py", "what"))
    ((_, flags),) = groups_of(parser)
    told = [(flag.names, flag.value, flag.default, flag.help.split(" ")[0]) for flag in flags]
    assert told == [("--epochs", "FLOAT", "", "Passes"), ("--seed", "INT", "1234", "Seed")]


def test_objectives_and_families_are_those_of_the_registries() -> None:
    text = TABLES["objectives"]()
    assert re.findall(r"^## (\w+)$", text, re.MULTILINE) == list(OBJECTIVES)
    assert "| `per_token` | `gamma` | `mean` | `bos` |" in text
    assert text.count("Needs nothing besides the gradient pass.") > 3
    table = TABLES["families"]()
    assert re.findall(r"^\| `(\w+)` \| ", table, re.MULTILINE) == list(FAMILIES)
    assert "\n| `mixtral` | `mixtral` | `MixtralForCausalLM` | yes | `hidden_act`: `silu`; " in table
    assert "\n| `gemma3` | `gemma3_text` | `Gemma3ForCausalLM` |  | `hidden_act`: `gelu` or `gelu_pytorch_tanh`; " in table
    assert all(f"| `{name}` | " in TABLES["unbuilt"]() for name in UNBUILT)


def test_what_a_help_text_holds_is_no_markup() -> None:
    assert prose("PREFIX_* of --data-path <x> {a}\n[b] `c`") == r"PREFIX\_\* of `--data-path` \<x\> \{a\} \[b\] \`c\`"


def test_a_table_that_does_not_exist_is_refused() -> None:
    assert fill_in("a\n{{x}}\n`{{name}}`", {"x": lambda: "1"}) == "a\n1\n`{{name}}`"
    with pytest.raises(KeyError):
        fill_in("{{y}}", {})


def test_patterns_of_the_navigation_take_what_no_line_names(tmp_path: Path) -> None:
    for name in ("index.md", "a.md", "b.md", "more/c.md", "more/d.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# x\n")
    nav = ["index.md", {"How": [{"First": "b.md"}, "*.md", {"More": ["more/d.md", "more/*.md"]}]}]
    assert expand(nav, tmp_path) == ["index.md", {"How": [{"First": "b.md"}, "a.md", {"More": ["more/d.md", "more/c.md"]}]}]


def test_links_that_leave_the_docs_are_on_the_site() -> None:
    files = linked_files(DOCS)
    assert files[PLACE + "benchmarks/README.md"] == ROOT / "benchmarks/README.md"
    assert files[PLACE + "examples/plugins/own_loop.py"] == ROOT / "examples/plugins/own_loop.py"
    text = "[a](../../benchmarks/README.md#pipeline) [b](batches.md) [c](https://x.y/z.md) `[d](../../README.md)`"
    assert site_links(text, "plugin/page.md", DOCS) == (
        "[a](../repository/benchmarks/README.md#pipeline) [b](batches.md) [c](https://x.y/z.md) `[d](../../README.md)`"
    )
    inside = "[a](../docs/performance.md#x)"
    assert site_links(inside, PLACE + "benchmarks/README.md", DOCS) == "[a](../../performance.md#x)"


def test_nothing_is_asked_of_the_network() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert settings["theme"]["font"] is False
    assert settings["plugins"] == ["search"]
    assert not any("://" in str(settings.get(key)) for key in ("extra_css", "extra_javascript", "extra", "theme"))


class _Loaded(HTMLParser):
    """What a page has a browser load by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        wanted = {"script": "src", "img": "src", "link": "href", "iframe": "src"}
        self.urls += [value for name, value in attrs if name == wanted.get(tag) and value]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """As make docs builds it; a broken link, a missing anchor or a page without a place is a warning."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mkdocs build --strict" in (ROOT / "Makefile").read_text(encoding="utf-8")
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(list(DOCS.rglob("*.md")))
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "<p>{{" not in text, page.name
        loaded = _Loaded()
        loaded.feed(text)
        assert [url for url in loaded.urls if "://" in url] == [], page.name


def test_the_trainer_parser_is_the_one_with_everything() -> None:
    assert {"--objective", "--beta", "--config", "--help"} <= set(trainer_parser()._option_string_actions)
