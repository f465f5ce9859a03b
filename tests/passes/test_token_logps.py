"""Log-probs of single tokens are those of transformers in float64, at any layout, on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rmipo.data.batches.batch_builder import BatchBuilder
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.pair_store import TokenizedPair
from megatron_rmipo.passes.token_logps import TokenLogps, token_layout, token_logps
from megatron_rmipo.runtime.groups import ProcessGroups
from tests.harness import run_distributed
from tests.integration.problem import BOS, collection, make_hf_model, make_pairs, unpaired
from tests.integration.worlds import Case, build_batches, build_state, run_at_layouts

# Not in stored order; a one-token response, equal responses and a one-token prompt are among them.
CHOSEN = [13, 3, 7, 11, 0]
CASES = {
    1: [Case("alone without a context", objective="dpo", tokens_per_microbatch=48)],
    4: [
        Case("TP 2 x PP 2", tp=2, pp=2, sequence_parallel=True, tokens_per_microbatch=60),
        Case("CP 2 x DP 2", cp=2, tokens_per_microbatch=60),
    ],
}


def tokens_at(case: Case, folder: str, pairs: PairCollection, groups: ProcessGroups) -> Any:
    state = build_state(case, Path(folder), groups)
    layout = token_layout(build_batches(case, pairs, state.policy, groups).layout)
    if case.objective == "dpo":
        # As with a tokenizer without a BOS.
        layout = token_layout(layout.__class__(**{**vars(layout), "bos_token_id": None, "unconditional": None}))
    state.model.eval()
    return token_logps(state.model, BatchBuilder(pairs, layout).build(np.array(CHOSEN)), groups)


def dense(hf_dir: Path, before: np.ndarray, response: np.ndarray) -> list[float]:
    """Of each token of the response that something stands before."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float64, attn_implementation="eager").eval()
    ids = torch.from_numpy(np.concatenate([before, response]))
    if len(ids) < 2:
        return []
    with torch.no_grad():
        logps = torch.log_softmax(model(ids[None]).logits[0, :-1], dim=-1)
    found = logps.gather(1, ids[1:, None])[:, 0].tolist()
    return found[max(len(before) - 1, 0) :]


@pytest.mark.dist
@pytest.mark.parametrize("world_size", sorted(CASES))
def test_tokens_are_those_of_the_dense_model_at_every_layout(world_size: int, tmp_path: Path) -> None:
    hf_dir = make_hf_model(tmp_path / "model")
    pairs = unpaired(make_pairs()) if world_size == 1 else make_pairs()
    ranks = run_distributed(run_at_layouts, world_size, tokens_at, CASES[world_size], str(hf_dir), collection(pairs))
    for number, case in enumerate(CASES[world_size]):
        found = ranks[0][number]
        assert all(rank[number] == found for rank in ranks)
        expected = _dense_tokens(hf_dir, pairs, context=case.objective != "dpo")
        assert set(found) == set(expected)
        for place, tokens in expected.items():
            assert found[place].logps == pytest.approx(tokens.logps, abs=2e-5)
            scored = [value for value in tokens.alone if value is not None]
            # None where nothing stands before a first token.
            assert [value is None for value in found[place].alone] == [value is None for value in tokens.alone]
            assert [value for value in found[place].alone if value is not None] == pytest.approx(scored, abs=2e-5)


def _dense_tokens(hf_dir: Path, pairs: list[TokenizedPair], *, context: bool) -> dict[tuple[int, int], TokenLogps]:
    expected = {}
    before = np.array([BOS] if context else [], dtype=np.int64)
    for place, number in enumerate(CHOSEN):
        pair = pairs[number]
        for branch, response in enumerate((pair.chosen, pair.rejected)):
            alone = dense(hf_dir, before, response) if response.size else []
            logps = dense(hf_dir, pair.prompt, response) if response.size else []
            expected[place, branch] = TokenLogps(logps, [None] * (len(logps) - len(alone)) + alone)
    return expected
