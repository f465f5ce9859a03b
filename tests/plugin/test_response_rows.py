from __future__ import annotations

import pytest
import torch

from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.objectives.pair_sums import PairSums, pair_logps
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.plugin.response_rows import (
    RowOrder,
    pair_losses,
    pairs_of_rows,
    refuse_needs,
    rows_of_pairs,
    rows_of_responses,
    sums_of_rows,
)

# Two prompts with responses of 3, 1, 2 and 3 tokens; 0 is padding.
TOKEN_IDS = torch.tensor([[1, 5, 6, 7, 8, 0], [1, 5, 9, 0, 0, 0], [1, 4, 3, 6, 5, 0], [1, 4, 3, 7, 8, 9]])
RESPONSE = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]])


@pytest.mark.parametrize(
    ("order", "rows"), [("interleaved", [[0, 1], [2, 3], [4, 5]]), ("chosen_first", [[0, 3], [1, 4], [2, 5]])]
)
def test_rows_and_pairs_are_each_others_inverse(order: RowOrder, rows: list[list[int]]) -> None:
    pairs = pairs_of_rows(torch.arange(6), order)
    assert pairs.tolist() == rows
    assert rows_of_pairs(pairs, order).tolist() == list(range(6))
    assert pairs_of_rows(rows_of_pairs(torch.tensor([7, 8, 9]), order), order).tolist() == [[7, 7], [8, 8], [9, 9]]


def test_a_row_without_its_pair_is_refused() -> None:
    with pytest.raises(ConfigError, match="a batch of 3 rows"):
        pairs_of_rows(torch.zeros(3), "interleaved")


def test_sums_keep_their_digits_and_read_nothing_else() -> None:
    generator = torch.Generator().manual_seed(3)
    logprobs = -5 * torch.rand(4, 1001, generator=generator) - 4
    scored = torch.rand(4, 1001, generator=generator) < 0.9
    dense = torch.where(scored, logprobs.double(), 0.0).sum(1)
    unread = torch.where(scored, logprobs, float("-inf")).requires_grad_()
    scores = sums_of_rows(unread, scored, "interleaved")
    assert torch.equal(scores.logps, dense.float().view(2, 2))
    assert torch.equal(scores.lengths, scored.sum(1).float().view(2, 2))
    scores.logps.sum().backward()
    assert unread.grad is not None
    assert torch.equal(unread.grad, scored.float())
    assert torch.equal(scores[1:].logps, scores.logps[1:])


@pytest.mark.parametrize("context", [1, None])
def test_responses_alone(context: int | None) -> None:
    rows = rows_of_responses(TOKEN_IDS, RESPONSE, context_token_id=context, pad_token_id=2)
    responses = [[6, 7, 8], [9], [6, 5], [7, 8, 9]]
    before = [] if context is None else [context]
    for row, response in enumerate(responses):
        ids, attended, scored = rows.token_ids[row], rows.attended[row], rows.scored[row]
        assert ids[attended].tolist() == before + response
        assert attended.tolist() == sorted(attended.tolist(), reverse=True)
        assert ids[scored].tolist() == (response if context else response[1:])
        assert set(ids[~attended].tolist()) <= {2}


def test_what_a_response_leaves_out_is_read_and_not_scored() -> None:
    response = RESPONSE.clone()
    response[0, 3] = 0
    response[1] = 0
    rows = rows_of_responses(TOKEN_IDS, response, context_token_id=1)
    assert rows.token_ids[0].tolist() == [1, 6, 7, 8]
    assert rows.scored[0].tolist() == [False, True, False, True]
    assert rows.attended[1].tolist() == [True, False, False, False]
    rows = rows_of_responses(TOKEN_IDS, response, context_token_id=None, pad_token_id=2)
    assert (rows.token_ids[1].tolist(), rows.attended[1].tolist()) == ([2, 2, 2], [True, False, False])
    assert not rows.scored[1].any()


def test_a_response_without_a_token_is_refused() -> None:
    scores = PairSums(-torch.ones(3, 2), torch.tensor([[2.0, 1.0], [1.0, 0.0], [3.0, 0.0]]))
    logps = pair_logps(scores, mean_chosen_length=torch.tensor(2.0), reference=-torch.ones(3, 2))
    with pytest.raises(DataError, match=r"rejected response of pair 1 of a batch is scored \(2 such pairs\); objective simpo"):
        pair_losses(build_objective("simpo", {}), logps)
    assert pair_losses(build_objective("sft", {}), logps).losses.tolist() == [0.5] * 3


def test_needs_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="objective kto in a loop: it needs log-probs of responses to other prompts; none, so"):
        refuse_needs(build_objective("kto", {}), "a loop", {"batch": "no", "mismatched": "none, so"})
    refuse_needs(build_objective("rmipo", {}), "a loop", {"batch": "no", "mismatched": "none"})
