"""Held-out pairs in other programs' loops: the same at every evaluation, and enough of them."""

from __future__ import annotations

import pytest

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.plugin.adapters.held_out import HeldOutBatches, pairs_of_evaluation
from tests.integration.problem import collection, make_pairs
from tests.plugin.test_batches import make


def test_every_evaluation_has_the_same_micro_batches() -> None:
    batches = HeldOutBatches(lambda: make(global_batch_size=6, num_microbatches=2, total_pairs=12))
    evaluations = []
    for _ in range(3):
        seen = []
        for _ in range(2):
            batch = batches.peek()
            microbatches = [next(batches), next(batches)]
            assert all(one.batch is batch for one in microbatches)
            seen += [one.row.token_ids.tolist() for one in microbatches]
        evaluations.append(seen)
    assert evaluations[0] == evaluations[1] == evaluations[2]
    assert len({str(one) for one in evaluations[0]}) == 4


def test_more_pairs_than_there_are_is_refused() -> None:
    pairs, named = collection(make_pairs()), ("--eval-iters", "--eval-global-batch-size", "--valid-data-path B")
    message = r"--eval-iters 100 x 8 pairs: --valid-data-path B has 24. Give --eval-iters 3, or a smaller --eval-g"
    with pytest.raises(ConfigError, match=message):
        pairs_of_evaluation(pairs, 100, 8, named=named)
    assert pairs_of_evaluation(pairs, 3, 8, named=named) == 24
