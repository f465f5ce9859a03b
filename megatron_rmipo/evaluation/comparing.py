"""``--compare``: the pairs of another evaluation beside those of this one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rmipo.errors import DataError
from megatron_rmipo.evaluation.figures import Agreement, agreement_of
from megatron_rmipo.evaluation.results import Bootstrap, SetResults, pair_lines
from megatron_rmipo.evaluation_file import Cell, EvaluationTable

# Where a pair stands: its set, its row there, and which answers it is made of.
_Place = tuple[str, int, int, int]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two evaluations side by side.

    Attributes:
        table: of all sets and criteria that both have.
        agreements: set -> criterion -> the comparison.
    """

    table: EvaluationTable
    agreements: dict[str, dict[str, Agreement]]


def read_pairs(path: Path) -> dict[_Place, dict[str, tuple[float, float]]]:
    """The scores of the pairs of ``--pairs FILE`` of another evaluation.

    Raises:
        DataError: it cannot be read, or is no such file.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--compare {path} cannot be read: {error}. Name what --pairs wrote.") from error
    found: dict[_Place, dict[str, tuple[float, float]]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            one: Any = json.loads(line)
            scores = {name: (float(chosen), float(rejected)) for name, (chosen, rejected) in one["scores"].items()}
            found[one["set"], one["row"], *one["answers"]] = scores
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"--compare {path}: line {number} is none that --pairs writes ({error!r}).") from error
    return found


def compare(results: Sequence[SetResults], path: Path, bootstrap: Bootstrap) -> Comparison:
    """Compare the pairs that both evaluations have, by set and criterion.

    Raises:
        DataError: as :func:`read_pairs`, or they have no pair or no criterion in common.
    """
    other, rows, agreements = read_pairs(path), list[list[Cell]](), dict[str, dict[str, Agreement]]()
    for one in results:
        places = [(line["set"], line["row"], *line["answers"]) for line in pair_lines(one)]
        shared = [number for number, place in enumerate(places) if place in other]
        for name in one.scores:
            both = [number for number in shared if name in other[places[number]]]
            if not both:
                continue
            others = np.array([other[places[number]][name] for number in both])
            found = agreement_of(
                one.margins(name)[both],
                others[:, 0] - others[:, 1],
                one.asked.question_numbers[both],
                samples=bootstrap.samples,
                seed=bootstrap.seed,
            )
            agreements.setdefault(one.asked.name, {})[name] = found
            counts = (found.both_right, found.first_alone, found.second_alone, found.neither)
            figures = (found.agreement, *found.difference, found.p_value)
            rows.append([one.asked.name, name, found.num_pairs, *counts, *(round(value, 4) for value in figures)])
    if not rows:
        raise DataError(f"--compare {path}: it has no pair of these sets, or none by the same criterion. Evaluate the same sets.")
    columns = [
        "set",
        "by",
        "pairs",
        "both right",
        "this alone",
        "other alone",
        "neither",
        "agreement",
        "difference",
        "low",
        "high",
        "p",
    ]
    note = "difference: accuracy of this less that of the other, with bounds as above; p: McNemar's, exact."
    return Comparison(EvaluationTable(f"beside {path}", columns, rows, note), agreements)
