"""docs/scaling.md says what the planner says."""

from __future__ import annotations

from benchmarks.performance_page import markdown
from benchmarks.scaling_page import PAGE, PLANS, TEMPLATE, layouts_line, printed_plan, published_table


def test_the_page_is_what_the_planner_says() -> None:
    """Of its plans and lines the quickest to make: the others come from the same functions."""
    page = PAGE.read_text(encoding="utf-8")
    line = markdown((), [layouts_line("llama3-8b", 1)]).splitlines()[-1]
    for part in (published_table(), printed_plan(PLANS["plan_8b"]), line):
        assert part in page, "run: make scaling"


def test_the_words_around_are_those_of_the_template() -> None:
    page = PAGE.read_text(encoding="utf-8")
    text = TEMPLATE.read_text(encoding="utf-8")
    for part in text.split("{{"):
        assert part.split("}}")[-1] in page, "run: make scaling"
