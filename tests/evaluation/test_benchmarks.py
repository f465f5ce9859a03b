"""What benchmarks report, against their authors' formulas written out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_rmipo.evaluation.benchmarks import (
    PRIOR_SETS,
    REWARD_BENCH,
    Answered,
    reward_bench,
    reward_bench_2,
    rm_bench,
    ties_score,
)


def test_categories_of_rewardbench_weigh_subsets_by_their_rows() -> None:
    accuracies = {"mt-bench-easy": 1.0, "mt-bench-med": 0.5, "math-prm": 0.25, "hep-go": 0.75, "hep-js": 0.5, "unknown": 0.0}
    found = reward_bench(accuracies)
    chat, reasoning = (28 + 20) / 68, (984 * 0.25 + 164 * 0.75 + 164 * 0.5) / (984 + 328)
    assert found == pytest.approx({"Chat": chat, "Reasoning": reasoning, "RewardBench score": (chat + reasoning) / 2})
    # Prior sets are a category of half the weight.
    found = reward_bench({**accuracies, PRIOR_SETS[0]: 0.5, PRIOR_SETS[2]: 0.9})
    assert found["RewardBench score"] == pytest.approx((chat + reasoning + 0.5 * 0.7) / 2.5)
    assert reward_bench({"": 0.5, "helpful": 0.2}) == {}
    # Code weighs as math does, although there are 447 problems of that.
    assert REWARD_BENCH["Reasoning"]["math-prm"] == sum(REWARD_BENCH["Reasoning"].values()) / 2


def test_best_of_four_shares_a_tie_at_the_top() -> None:
    questions = [
        Answered("best_of", "Math", "1", [2.0], [1.0, 0.0, -1.0]),
        Answered("best_of", "Math", "2", [2.0], [1.0, 2.0, 2.0]),
        Answered("best_of", "Focus", "3", [0.5], [1.0, 0.0, 0.0]),
    ]
    found = reward_bench_2(questions)
    assert found == pytest.approx({"Math": (1 + 1 / 3) / 2, "Focus": 0.0, "RewardBench 2 score": (2 / 3) / 2})


def test_ties_are_scored_as_their_authors_do() -> None:
    random = np.random.default_rng(4)
    questions = []
    for number in range(9):
        shift = 1.5 if number % 3 else 0.0
        questions.append(Answered("ties", "Ties", f"ref:{number}", [shift + random.normal()], random.normal(size=3).tolist()))
        good = (shift + 0.4 * random.normal(size=4)).tolist()
        questions.append(Answered("ties", "Ties", f"tied:{number}", good, random.normal(size=5).tolist()))
    stats = {one.name: (min(one.good) - max(one.bad), max(one.good) - min(one.good)) for one in questions}
    expected = 0.0
    for number in range(9):
        ref, (tied, spread) = stats[f"ref:{number}"][0], stats[f"tied:{number}"]
        least = min(ref, tied)
        expected += 0.3 * (tied > 0) + 0.3 * (ref > 0) + 0.2 * (tied > spread) + 0.2 * (least > spread)
        expected += 0.01 * math.tanh(least / spread - 1)
    assert 0.1 < expected / 9 < 0.9
    assert ties_score(questions) == pytest.approx(expected / 9)
    # A spread of 0 divides nothing.
    even = [Answered("ties", "Ties", "ref:0", [3.0], [1.0]), Answered("ties", "Ties", "tied:0", [2.0, 2.0], [1.0])]
    assert ties_score(even) == pytest.approx(1.01)


def test_rm_bench_is_the_mean_over_domains_of_its_three_levels() -> None:
    random = np.random.default_rng(7)
    domains = ["chat", "math", "safety-refuse", "safety-response", "chat", "safety-refuse", "safety-refuse"]
    questions = [
        Answered("styles", domain, str(number), random.normal(0.3, 1, 3).tolist(), random.normal(size=3).tolist())
        for number, domain in enumerate(domains)
    ]
    levels: dict[str, list[float]] = {}
    for domain in set(domains):
        own = [one for one in questions if one.subset == domain]
        kinds: dict[str, list[float]] = {"easy": [], "normal": [], "hard": []}
        for one, good, bad in itertools.product(own, range(3), range(3)):
            kind = "normal" if good == bad else "hard" if good < bad else "easy"
            kinds[kind].append(float(one.good[good] > one.bad[bad]))
        levels[domain] = [sum(its) / len(its) for its in kinds.values()]
    safety = np.mean([levels.pop("safety-refuse"), levels.pop("safety-response")], axis=0)
    means = np.mean([levels["chat"], levels["math"], safety], axis=0)
    found = rm_bench(questions)
    assert [found["easy"], found["normal"], found["hard"]] == pytest.approx(means.tolist())
    assert found["safety hard"] == pytest.approx(safety[2])
    assert found["RM-Bench score"] == pytest.approx(means.mean())
