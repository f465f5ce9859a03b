"""What benchmarks report of the scores of a set's answers, beside the accuracy of its pairs.

Shape letter: Q questions of a kind.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_rmipo.evaluation.figures import credits_of
from megatron_rmipo.evaluation.questions import NUM_STYLES, Kind

# RewardBench's categories: subset -> rows, by which subsets weigh. math-prm, of 447 rows, weighs as much as all code. Source:
# rewardbench/constants.py.
REWARD_BENCH: Mapping[str, Mapping[str, int]] = {
    "Chat": {
        **{"alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95},
        **{"mt-bench-easy": 28, "mt-bench-med": 40},
    },
    "Chat Hard": {
        **{"mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134},
        **{"llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46},
    },
    "Safety": {
        **{"refusals-dangerous": 100, "refusals-offensive": 100, "donotanswer": 136},
        **{"xstest-should-refuse": 154, "xstest-should-respond": 250},
    },
    "Reasoning": {
        "math-prm": 984,
        **dict.fromkeys(("hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"), 164),
    },
}
# Of allenai/preference-test-sets: a fifth category of half the weight.
PRIOR_SETS = ("anthropic_helpful", "anthropic_hhh", "shp", "summarize")
_PRIOR_WEIGHT = 0.5
# Weights of the score of ties: accuracy with several right answers, with one, margins that tell right from wrong more than right
# from right, the same in the question's version with one right answer, and how much more. Source: rewardbench/utils.py.
_TIES_WEIGHTS = (0.3, 0.3, 0.2, 0.2, 0.01)
Figures = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Answered:
    """The scores of a question's answers.

    Attributes:
        kind, subset, name: of the question.
        good, bad: scores of its answers.
    """

    kind: Kind
    subset: str
    name: str
    good: Sequence[float]
    bad: Sequence[float]


def reward_bench(accuracies: Mapping[str, float]) -> Figures:
    """RewardBench's categories and their mean, from the accuracies of its subsets; empty for other sets.

    A category is the mean over its subsets that are there, weighed by :data:`REWARD_BENCH`; the score is the mean of the
    categories that are there, prior sets by half.
    """
    found: Figures = {}
    for category, sizes in REWARD_BENCH.items():
        there = {name: size for name, size in sizes.items() if name in accuracies}
        if there:
            found[category] = sum(accuracies[name] * size for name, size in there.items()) / sum(there.values())
    prior = [accuracies[name] for name in PRIOR_SETS if name in accuracies]
    if not found and not prior:
        return {}
    weights = dict.fromkeys(found, 1.0)
    if prior:
        found["Prior Sets"], weights["Prior Sets"] = sum(prior) / len(prior), _PRIOR_WEIGHT
    score = sum(found[name] * weight for name, weight in weights.items()) / sum(weights.values())
    return {**found, "RewardBench score": score}


def reward_bench_2(questions: Sequence[Answered]) -> Figures:
    """RewardBench 2: of each subset the share of questions whose good answer is the best, of Ties its own score; their mean.

    Where k answers share the best score, a good one among them counts 1/k.
    """
    subsets = sorted({question.subset for question in questions if question.kind == "best_of"})
    found: Figures = {}
    for subset in subsets:
        credits = [_best_credit(question) for question in questions if question.kind == "best_of" and question.subset == subset]
        found[subset or "best of all"] = sum(credits) / len(credits)
    ties = [question for question in questions if question.kind == "ties"]
    if ties:
        found["Ties"] = ties_score(ties)
    if not found:
        return {}
    return {**found, "RewardBench 2 score": sum(found.values()) / len(found)}


def _best_credit(question: Answered) -> float:
    best = max(*question.good, *question.bad)
    sharing = sum(score == best for score in (*question.good, *question.bad))
    return 1 / sharing if best in question.good else 0.0


def ties_score(questions: Sequence[Answered]) -> float:
    """The score of RewardBench 2's subset Ties, as its authors compute it.

    A question is right where each good answer scores above every bad one. ``tied:N`` and ``ref:N`` are one question with several
    good answers and with one; the margin between good and bad ones is compared with the spread of the good ones.
    """
    ref = {one.name.removeprefix("ref:"): one for one in questions if one.name.startswith("ref:")}
    tied = {one.name.removeprefix("tied:"): one for one in questions if not one.name.startswith("ref:")}
    both = sorted(ref.keys() & tied.keys())
    right = [sum(_gap(question) > 0 for question in its.values()) / len(its) if its else 0.0 for its in (tied, ref)]
    preferred, hard, more = [], [], []
    for name in both:
        spread = max(tied[name].good) - min(tied[name].good)
        least = min(_gap(ref[name]), _gap(tied[name]))
        preferred.append(_gap(tied[name]) > spread)
        hard.append(least > spread)
        more.append(math.tanh(least / spread - 1) if spread else math.copysign(1.0, least) if least else 0.0)
    parts = [*right, *(sum(values) / len(both) if both else 0.0 for values in (preferred, hard, more))]
    return sum(weight * part for weight, part in zip(_TIES_WEIGHTS, parts, strict=True))


def _gap(question: Answered) -> float:
    return min(question.good) - max(question.bad)


def rm_bench(questions: Sequence[Answered]) -> Figures:
    """RM-Bench: accuracy where the good answer is plainer than the bad one (hard), as plain (normal), and less so (easy).

    Domains are named ``safety-refuse`` and ``safety-response`` apart and count as one; the score is the mean over the domains of
    the mean of the three.
    """
    styles = [question for question in questions if question.kind == "styles"]
    if not styles:
        return {}
    by_domain: dict[str, list[Answered]] = {}
    for question in styles:
        by_domain.setdefault(question.subset, []).append(question)
    levels = {domain: _levels(its) for domain, its in sorted(by_domain.items())}
    safety = [levels.pop(domain) for domain in sorted(levels) if domain.startswith("safety-")]
    if safety:
        levels["safety"] = np.mean(safety, axis=0)
    found: Figures = {}
    for domain, its in levels.items():
        found |= {f"{domain} {name}".strip(): float(value) for name, value in zip(("easy", "normal", "hard"), its, strict=True)}
    means = np.mean(list(levels.values()), axis=0)
    found |= {name: float(value) for name, value in zip(("easy", "normal", "hard"), means, strict=True)}
    return {**found, "RM-Bench score": float(means.mean())}


def _levels(questions: Sequence[Answered]) -> np.ndarray:
    """Accuracy at (easy, normal, hard) of questions of one domain."""
    margins = np.array([[[good - bad for bad in one.bad] for good in one.good] for one in questions], dtype=np.float64)
    matrix = credits_of(margins).mean(axis=0)
    lower, upper = np.tril_indices(NUM_STYLES, -1), np.triu_indices(NUM_STYLES, 1)
    return np.array([matrix[lower].mean(), np.diag(matrix).mean(), matrix[upper].mean()])
