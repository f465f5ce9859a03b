"""What tutorials and explanations say of the code is so: excerpts, numbers worked out by hand, the first steps of a reader."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from megatron_rmipo.data.batches.packing import pack_pairs
from megatron_rmipo.data.store.pair_store import TokenizedPair
from megatron_rmipo.objectives.rmipo import Rmipo
from tests.harness import run_distributed
from tests.test_readme import blocks, commands_of, main_of, program

DOCS = Path(__file__).parents[2] / "docs"


def table_after(page: str, titles: str) -> list[list[str]]:
    """Rows of the table whose line of titles begins so, without them."""
    lines = page[page.index(titles) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_excerpts_are_of_the_example() -> None:
    example = (DOCS.parent / "examples/plugins/own_loop.py").read_text(encoding="utf-8")
    excerpts = [body for language, body in blocks((DOCS / "tutorials/your_megatron.md").read_text()) if language == "py"]
    assert len(excerpts) == 4
    for body in excerpts:
        lines = iter(line.strip() for line in example.splitlines())
        # In its order; between two lines the example may have others.
        assert all(line.strip() in lines for line in body.splitlines()), body


def test_the_packed_row_of_the_page_is_the_one_that_is_packed() -> None:
    ids = {"x1": 1, "x2": 2, "x3": 3, "w1": 11, "w2": 12, "w3": 13, "l1": 21, "l2": 22}
    names = {number: name for name, number in ids.items()}
    row = pack_pairs([TokenizedPair(prompt=[1, 2, 3], chosen=[11, 12, 13], rejected=[21, 22])], [0])
    predicts: dict[int, list[str]] = {}
    for source, target in zip(row.source.tolist(), row.target.tolist(), strict=True):
        predicts.setdefault(source, []).append(names[target])
    segment = [number for number, (_, length, *_) in enumerate(row.segments.tolist()) for _ in range(length)]
    expected = [
        [str(place), names[token], str(position), str(segment[place]), ", and ".join(predicts.get(place, []))]
        for place, (token, position) in enumerate(zip(row.token_ids.tolist(), row.position_ids.tolist(), strict=True))
    ]
    page = (DOCS / "explanation/packing.md").read_text(encoding="utf-8")
    assert table_after(page, "| place | token |") == expected
    assert row.segments.tolist()[1] == [5, 1, 0, 3]


def test_the_margins_of_the_page_are_those_of_the_objective() -> None:
    page = (DOCS / "explanation/margins.md").read_text(encoding="utf-8")
    titles = re.search(r"^\| dpmi \|((?: -?[\d.]+ \|)+)$", page, re.MULTILINE)
    assert titles
    signal = torch.tensor([float(cell) for cell in titles[1].rstrip("|").split("|")])
    ((name, *cells),) = table_after(page, titles[0])
    assert name == "gamma"
    assert cells == [f"{gamma:.3f}" for gamma in Rmipo().target_margin(signal).tolist()]


def test_the_mean_of_means_of_the_page() -> None:
    page = (DOCS / "explanation/invariance.md").read_text(encoding="utf-8")
    assert f"means is {((1 + 2) / 2 + 6) / 2}; the mean of the pairs is {(1 + 2 + 6) / 3:g}" in textwrap.fill(page, 10**6)


@pytest.mark.parametrize("path", sorted((DOCS / "explanation").glob("*.svg")), ids=lambda path: path.name)
def test_diagrams_are_small_and_tell_what_they_show(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text) < 8000
    assert "<title>" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert f"]({path.name})" in "".join(page.read_text() for page in path.parent.glob("*.md"))


def follow(directory: Path, commands: list[list[str]]) -> list[object]:
    """Run commands one after the other as a reader does, in this process; what each returns."""
    os.chdir(directory)
    sys.path.insert(0, str(directory))
    started = [(name.replace("rmipo.train", "rmipo.training.main"), arguments) for name, arguments in map(program, commands)]
    return [main_of(name)(arguments) for name, arguments in started]


@pytest.mark.dist
@pytest.mark.slow
def test_a_reader_who_follows_the_tutorials_gets_there(tmp_path: Path) -> None:
    pages = [(DOCS / "tutorials" / name).read_text(encoding="utf-8") for name in ("your_data.md", "your_objective.md")]
    (mine,) = [body for language, body in blocks(pages[1]) if language == "python"]
    (tmp_path / "mine.py").write_text(mine, encoding="utf-8")
    commands = [words for page in pages for words in commands_of(page)]
    assert len(commands) == 9
    (results,) = run_distributed(follow, 1, tmp_path, commands)
    assert set(results) == {0}
    records = [json.loads(line) for line in (tmp_path / "work/capped/logs/metrics.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in records] == ["eval", *["train"] * 6, "eval"]
    assert all("done" in record and record["loss"] >= 0.0 for record in records)
    # What a run leaves is what the page of its directory names.
    page = (DOCS / "reference/run_directory.md").read_text(encoding="utf-8")
    logs = {path.name + "/" * path.is_dir() for path in (tmp_path / "work/first/logs").iterdir()}
    assert {name for name in logs if f"| `{name}` |" not in page} == set()
    assert (tmp_path / "work/first-hf/config.json").is_file()
