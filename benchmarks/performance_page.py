"""docs/performance.md from the entries of the benchmarks.

    python -m benchmarks.performance_page            # writes the page
    python -m benchmarks.performance_page --check    # exits with 1 where it is not what the entries say

The text stands in performance_template.md; ``{{name}}`` in it is where a table goes. Of several entries of one setting the newest
is shown. Goals come from goals.csv, which every benchmark appends to.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if not __package__:  # Started as a file.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.generated_page import fill, write_or_compare
from benchmarks.performance_tables import TABLES, Table
from benchmarks.report import FOLDER, GOALS_FILE, read_rows

PAGE = FOLDER.parent / "docs" / "performance.md"
TEMPLATE = FOLDER / "performance_template.md"
ENVIRONMENT = ("date", "commit", "device", "torch", "megatron_core", "transformers")
NOT_MEASURED = "Not measured yet."
Row = Mapping[str, str]


class Environments:
    """Numbers for where and when entries were measured, in the order in which they are first asked for."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, ...], int] = {}

    def number(self, row: Row) -> int:
        """The number of this entry's environment, from 1."""
        return self._numbers.setdefault(tuple(row.get(name, "") for name in ENVIRONMENT), len(self._numbers) + 1)

    def table(self) -> str:
        """A line for each number."""
        titles = ("", *(name.replace("_", "-") for name in ENVIRONMENT))
        return markdown(titles, [(str(number), *values) for values, number in self._numbers.items()])


def newest(rows: Sequence[Row], key: Sequence[str]) -> list[Row]:
    """The last of the rows that have the same values of ``key``, each where the first of them stood."""
    return list({tuple(row[name] for name in key): row for row in rows}.values())


def markdown(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; figures that a cell holds are not aligned further."""
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def show_table(table: Table, rows: Sequence[Row], environments: Environments) -> str:
    """The newest entry of each setting, with its figures and the number of its environment."""
    entries = [row for row in rows if table.takes(row)]
    if not entries:
        return NOT_MEASURED
    latest = {table.setting(row): row for row in entries}
    lines = [
        [*setting, *(figure.text(row) for figure in table.figures), str(environments.number(row))]
        for setting, row in latest.items()
    ]
    return markdown([*table.settings, *(figure.title for figure in table.figures), "where"], lines)


def show_goals(rows: Sequence[Row], environments: Environments) -> str:
    """Goal and measured side by side, the newest of each goal."""
    if not rows:
        return NOT_MEASURED
    lines = [
        (
            row["name"],
            f"{'at least' if row['at_least'] == 'True' else 'at most'} {float(row['limit']):.4g}",
            f"{float(row['measured']):.4g}",
            "yes" if row["reached"] == "True" else "**no**",
            str(environments.number(row)),
        )
        for row in newest(rows, ("benchmark", "name"))
    ]
    return markdown(("measured quantity", "goal", "measured", "reached", "where"), lines)


def render(folder: Path = FOLDER) -> str:
    """The page, from the entries in ``folder``."""
    environments = Environments()
    shown = {"goals": show_goals(read_rows(folder / GOALS_FILE), environments)}
    for name, table in TABLES.items():
        shown[name] = show_table(table, read_rows(folder / table.file), environments)
    shown["environments"] = environments.table()
    return fill(TEMPLATE, shown)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or compare it."""
    prog = "python -m benchmarks.performance_page"
    return write_or_compare(PAGE, render, argv, prog=prog, stale="not what the entries say. Run: make performance")


if __name__ == "__main__":
    sys.exit(main())
