"""Every objective has a page with its options as they are, the index lists all of them, and the program tells the same."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rmipo.config.values import convert, field_types
from megatron_rmipo.objectives.__main__ import default_in_words, main
from megatron_rmipo.objectives.base import BatchLogps, LogpNeeds, LossOutput, PairLogps
from megatron_rmipo.objectives.registry import OBJECTIVES, build_objective
from tests.objectives.batches import with_prepared
from tests.objectives.float64 import numbers_of, softplus
from tests.objectives.pairs import random_pairs

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
    known |= {"clip_grad", "global_batch_size", "objective", "lr"}
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


# No loss of this name is TRL's, and its page has its own comparison.
WITHOUT_TRL = {"rmipo"}


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - WITHOUT_TRL))
def test_the_page_says_how_trl_differs(name: str) -> None:
    page = (DOCS / "objectives" / f"{name}.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^\*\*TRL\*\*: \S", page, re.MULTILINE)) == 1
    # Its version stands in one place.
    assert not re.search(r"\b\d+\.\d+\.\d+\b", page)


def test_the_flags_that_give_trls_losses_are_flags_of_their_objectives() -> None:
    index = (DOCS / "objectives.md").read_text(encoding="utf-8")
    commands = re.findall(r"`--objective ([a-z_]+)((?: --[\w-]+ [\w.]+)*)`", index)
    assert len(commands) > 12
    for name, flags in commands:
        options = {option.replace("-", "_"): value for option, value in re.findall(r"--([\w-]+) ([\w.]+)", flags)}
        assert set(options) <= set(options_in_code(name)), name
        kinds = field_types(OBJECTIVES[name].Config)
        build_objective(name, {option: convert(value, kinds[option]) for option, value in options.items()})


def test_the_program_lists_every_objective(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = [line.split(None, 1) for line in capsys.readouterr().out.splitlines()[1:]]
    needs = dict(lines)
    assert list(needs) == list(OBJECTIVES)
    assert needs["rmipo"] == "log p(y), context bos (forward only, each step)"
    assert needs["simpo"] == "-"
    assert needs["dpo"] == "reference (log-probs computed once)"
    assert "mismatched pairs (forward only, each step)" in needs["kto"]
    assert "global batch beforehand (forward only, each step)" in needs["beta_dpo"]
    assert needs["sft"] == "the chosen responses alone"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_program_explains_every_objective(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main([name]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{name}: ")
    assert "needs: " in text
    for option, default in options_in_code(name).items():
        switch = r"\[no-\]" if "bool" in str(OBJECTIVES[name].Config.__dataclass_fields__[option].type) else ""
        assert re.search(rf"^--{switch}{option.replace('_', '-')} +{re.escape(default)} +\S", text, re.MULTILINE), option
    if not options_in_code(name):
        assert text.endswith("no options\n")


@pytest.mark.parametrize(
    ("name", "symbols"),
    [
        ("alpha_dpo", ["x = bar Lw - bar Ll", "s = alpha", "z is the z-score of"]),
        ("epsilon_dpo", ["h = (Lw - Rw) - (Ll - Rl)", "step is 1 where", "f, r the logits"]),
        ("rmipo", ["gamma(dpmi) = gamma_min + (gamma_max - gamma_min) w", "exponential w = exp(-r)", "Uw, Ul sum log p(y)"]),
    ],
)
def test_the_program_tells_what_the_letters_of_a_formula_are(
    capsys: pytest.CaptureFixture[str], name: str, symbols: list[str]
) -> None:
    assert main([name]) == 0
    text = capsys.readouterr().out
    assert all(symbol in text for symbol in symbols), text
    assert text.count("\nNotation: ") == 1


def test_the_example_computes_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (DOCS / "objectives.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "page_example.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    objective = build_objective("page_example:UsualMargin", {})
    state = objective.initial_state()
    usual = 0.0
    for step in range(3):
        pairs = with_prepared(objective, random_pairs(7, seed=step), state)
        n = numbers_of(pairs)
        margins = (2.0 * (n.bar_lw - n.bar_ll)).tolist()
        usual = 0.9 * usual + 0.1 * sum(margins) / 7
        output = objective(pairs)
        assert output.losses.tolist() == pytest.approx([softplus(usual - margin) for margin in margins], rel=1e-5)
        assert output.metrics["rewards/margins"].tolist() == pytest.approx(margins, rel=1e-5)
        state = objective.advance(state, pairs.batch, output.metrics)
        assert state == pytest.approx({"usual": usual}, abs=1e-6)
    assert objective.needs == LogpNeeds(batch=True)


def test_the_program_lists_every_field_that_an_objective_meets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--fields"]) == 0
    text = capsys.readouterr().out
    assert all(len(line) <= 120 for line in text.splitlines())
    for kind in (LogpNeeds, BatchLogps, PairLogps, LossOutput):
        part = text[text.index(f"{kind.__name__}: ") :].partition("\n\n")[0]
        told = {
            name
            for line in part.splitlines()[1:]
            if (named := re.match(r"  (\w[\w, ]*):", line))
            for name in named[1].split(", ")
        }
        assert told == {field.name for field in dataclasses.fields(kind)}, kind
    assert all(name in text for name in ("logps/rejected", "nll/chosen", "tokens/chosen"))
    assert "`" not in text
    with pytest.raises(SystemExit):
        main(["dpo", "--fields"])


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
