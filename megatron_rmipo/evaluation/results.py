"""Figures of scored sets, as tables and as plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_rmipo.evaluation.benchmarks import Answered, Figures, reward_bench, reward_bench_2, rm_bench
from megatron_rmipo.evaluation.figures import (
    Floats,
    calibration_error,
    credits_of,
    deciles,
    length_bias,
    mean_interval,
)
from megatron_rmipo.evaluation.sets import EvaluationSet
from megatron_rmipo.evaluation_file import Cell, EvaluationTable

_DIGITS = 4


def table_text(table: EvaluationTable) -> str:
    """A table for the screen."""
    cells = [table.columns, *([_shown(value) for value in row] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [all(not isinstance(row[place], str) for row in table.rows) for place in range(len(table.columns))]
    aligned = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        for row in cells
    ]
    return "\n".join([table.title, *(f"  {line}".rstrip() for line in aligned), *([f"  {table.note}"] if table.note else [])])


def _shown(value: Cell) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


@dataclasses.dataclass(frozen=True)
class SetResults:
    """A set and what its pairs are ranked by.

    Attributes:
        asked: the set.
        lengths: ``[P, 2]``, tokens of the chosen and the rejected response of its pairs.
        scores: criterion -> float64 ``[P, 2]``.
        reward_is_logit: whether a sigmoid of the margin of ``reward`` is a probability.
    """

    asked: EvaluationSet
    lengths: npt.NDArray[np.int64]
    scores: Mapping[str, Floats]
    reward_is_logit: bool

    def margins(self, name: str) -> Floats:
        """Of a criterion, chosen less rejected, float64 ``[P]``."""
        scores = self.scores[name]
        margins: Floats = scores[:, 0] - scores[:, 1]
        return margins


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """Draws of the intervals.

    Attributes:
        samples: how many.
        seed: of the draws.
    """

    samples: int
    seed: int


def tables_of(one: SetResults, bootstrap: Bootstrap) -> list[EvaluationTable]:
    """The tables of a set: accuracy by subset, what its benchmark reports, margins and length, calibration."""
    tables = [_accuracy_table(one, bootstrap), _margin_table(one), _decile_table(one)]
    reported = benchmark_figures(one)
    if reported:
        names = list(dict.fromkeys(figure for its in reported.values() for figure in its))
        rows: list[list[Cell]] = [[name, *(_rounded(reported[by].get(name)) for by in reported)] for name in names]
        tables.insert(1, EvaluationTable(f"{one.asked.name}: as its benchmark reports it", ["", *reported], rows))
    return tables


def _accuracy_table(one: SetResults, bootstrap: Bootstrap) -> EvaluationTable:
    asked, rows = one.asked, list[list[Cell]]()
    for subset, pairs in _subsets(asked):
        for name in one.scores:
            margins = one.margins(name)[pairs]
            accuracy = mean_interval(
                credits_of(margins), asked.question_numbers[pairs], samples=bootstrap.samples, seed=bootstrap.seed
            )
            rows.append(
                [subset, len(margins), name, *map(_rounded, accuracy), *map(_rounded, (margins.mean(), np.median(margins)))]
            )
    columns = ["subset", "pairs", "by", "accuracy", "low", "high", "mean margin", "median margin"]
    title = f"{asked.name}: accuracy, with the bounds of 95 % of resampled questions"
    return EvaluationTable(title, columns, rows, _left_out_note(asked))


def _left_out_note(asked: EvaluationSet) -> str:
    if not asked.left_out:
        return ""
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(asked.left_out.items()))
    return f"left out of {asked.num_rows} rows: {reasons}; the first: {asked.examples[0]}"


def _subsets(asked: EvaluationSet) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
    """All pairs, then those of each subset where there are several."""
    subsets = np.array(asked.subsets)
    yield "all", np.arange(len(subsets))
    names = list(dict.fromkeys(subsets.tolist()))
    for name in names if len(names) > 1 else []:
        yield name or "(none)", np.flatnonzero(subsets == name)


def _margin_table(one: SetResults) -> EvaluationTable:
    rows = list[list[Cell]]()
    for name in one.scores:
        bias = length_bias(one.margins(name), one.lengths)
        error = calibration_error(one.margins(name)) if name == "reward" and one.reward_is_logit else None
        rows.append(
            [name, *(value for count, accuracy in bias.values() for value in (count, _rounded(accuracy))), _rounded(error)]
        )
    sides = ("longer", "shorter", "equal")
    columns = ["by", *(column for side in sides for column in (side, f"accuracy {side}")), "calibration error"]
    note = "pairs whose chosen answer has more, fewer or as many tokens; a calibration error is of rewards that are logits"
    return EvaluationTable(f"{one.asked.name}: length bias and calibration", columns, rows, note)


def _decile_table(one: SetResults) -> EvaluationTable:
    rows = list[list[Cell]]()
    for name in one.scores:
        rows += [
            # As a text: it names the row.
            [name, str(number), part.num_pairs, *map(_rounded, (part.least, part.greatest, part.accuracy))]
            for number, part in enumerate(deciles(one.margins(name)), start=1)
        ]
    columns = ["by", "tenth", "pairs", "least |margin|", "greatest |margin|", "accuracy"]
    title = f"{one.asked.name}: accuracy by tenths of |margin|, the least certain first"
    return EvaluationTable(title, columns, rows, is_detail=True)


def benchmark_figures(one: SetResults) -> dict[str, Figures]:
    """Criterion -> what the set's benchmark reports; empty for a set that is none."""
    found = {name: _benchmark_of(one, name) for name in one.scores}
    return {name: figures for name, figures in found.items() if figures}


def _benchmark_of(one: SetResults, name: str) -> Figures:
    questions = answered(one, name)
    by_subset = {subset: float(credits_of(one.margins(name)[pairs]).mean()) for subset, pairs in _subsets(one.asked)}
    only = {one.asked.subsets[0]: by_subset["all"]}
    pairs_alone = all(question.kind == "pair" for question in questions)
    return {
        **(reward_bench(by_subset if len(by_subset) > 1 else only) if pairs_alone else {}),
        **reward_bench_2(questions),
        **rm_bench(questions),
    }


def answered(one: SetResults, name: str) -> list[Answered]:
    """The questions of a set with the scores of their answers by a criterion."""
    found, place, scores = [], 0, one.scores[name]
    for question in one.asked.questions:
        good, bad = {}, {}
        for (first, second), (chosen, rejected) in zip(question.answers, scores[place:].tolist(), strict=False):
            good[first], bad[second] = chosen, rejected
        place += len(question.pairs)
        found.append(Answered(question.kind, question.subset, question.name, *(_in_order(its) for its in (good, bad))))
    return found


def _in_order(scores: Mapping[int, float]) -> Sequence[float]:
    return [scores[number] for number in sorted(scores)]


def pair_lines(one: SetResults) -> Iterator[dict[str, Any]]:
    """An object for each pair: where it stands, what it is of, its lengths and its scores."""
    place = 0
    for question in one.asked.questions:
        for answers in question.answers:
            yield {
                "set": one.asked.name,
                "row": question.row,
                "answers": list(answers),
                "subset": question.subset,
                "tokens": one.lengths[place].tolist(),
                "scores": {name: scores[place].tolist() for name, scores in one.scores.items()},
            }
            place += 1


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), _DIGITS)
