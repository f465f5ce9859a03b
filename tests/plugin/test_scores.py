"""Log-probs of pairs under an attached model against transformers in float64, at every layout, and what they are for."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import megatron_rmipo.plugin as plugin
from megatron_rmipo.data.store.collection import PairCollection, Span
from megatron_rmipo.data.store.in_memory import PairsInMemory
from megatron_rmipo.data.store.pair_store import TokenizedPair
from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.runtime.groups import ProcessGroups
from tests.harness import run_distributed
from tests.integration.problem import BOS, VOCAB, DenseProblem, collection, make_hf_model, make_pairs
from tests.integration.worlds import Case, run_at_layouts
from tests.plugin.foreign import Foreign, build_foreign

LAYOUTS = {
    1: [Case("TP 1"), Case("prompts not shared", share_prompts=False)],
    2: [Case("TP 2, sequence parallel", tp=2, sequence_parallel=True), Case("PP 2", pp=2), Case("DP 2")],
}


def lists_of(pairs: list[TokenizedPair]) -> list[Any]:
    return [(p.prompt.tolist(), p.chosen.tolist(), p.rejected.tolist()) for p in pairs]


def score_at_layouts(cases: list[Case], folder: str, pairs: list[TokenizedPair], rows: Any) -> list[Any]:
    """Of each case the log-probs on this rank, and those that objectives with a reference are given."""

    def compute(case: Case, folder: str, rows: Any, groups: ProcessGroups) -> dict[str, Any]:
        foreign = build_foreign(case, Path(folder) / "model", groups)
        foreign.model.train()
        few = {"tokens_per_microbatch": 60, "share_prompts": case.share_prompts}
        with_bos = plugin.score(foreign.model, rows, unconditional=True, context_token_id=BOS, **few)
        without = plugin.score(foreign.model, rows, unconditional=True, context_token_id=None, **few)
        # One data set of which others are not asked for, and some twice.
        part = PairCollection(collection(pairs).stores, [Span(5, 1, 1), Span(2, 1, 2), Span(9, 1, 1), Span(21, 1, 1)])
        plugin.score_reference(foreign.model, part, build_objective("kto", {}), **few)
        assert part.mismatched is not None
        kept = [part.scores_of(np.arange(5)), part.mismatched.scores_of(np.arange(5))]
        assert foreign.model.training
        assert all(parameter.grad is None for parameter in foreign.model.parameters())
        return {"bos": dataclasses.asdict(with_bos), "none": dataclasses.asdict(without), "kept": kept}

    return run_at_layouts(compute, cases, folder, rows)  # type: ignore[arg-type]


@pytest.mark.dist
@pytest.mark.parametrize("world_size", sorted(LAYOUTS))
def test_scores_are_the_dense_ones_on_every_rank(world_size: int, tmp_path: Path) -> None:
    pairs = make_pairs()
    # A response that the row does not have.
    pairs[4] = dataclasses.replace(pairs[4], rejected=pairs[4].rejected[:0])
    problem = DenseProblem(make_hf_model(tmp_path / "model"), tmp_path / "model", pairs)
    cases = LAYOUTS[world_size]
    dense = problem.conditional.detach()
    mismatched = problem._table(problem.model, problem._mismatched()).detach()
    alone = {
        name: problem._table(problem.model, [TokenizedPair(context, p.chosen, p.rejected) for p in pairs]).detach()
        for name, context in (("bos", np.array([BOS])), ("none", np.array([], dtype=np.int64)))
    }
    close = {"rtol": 1e-5, "atol": 1e-5}
    for results in run_distributed(score_at_layouts, world_size, cases, str(tmp_path), pairs, lists_of(pairs)):
        for case, found in zip(cases, results, strict=True):
            for name in ("bos", "none"):
                one = found[name]
                np.testing.assert_allclose(one["logps"], dense, **close, err_msg=case.name)
                np.testing.assert_allclose(one["unconditional_logps"], alone[name], **close, err_msg=case.name)
                there = [[p.chosen.size, p.rejected.size] for p in pairs]
                assert one["lengths"].tolist() == there
                fewer = 0 if name == "bos" else 1
                assert one["unconditional_lengths"].tolist() == np.maximum(np.array(there) - fewer, 0).tolist()
            np.testing.assert_allclose(found["kept"][0], dense[[5, 2, 2, 9, 21]], **close, err_msg=case.name)
            np.testing.assert_allclose(found["kept"][1], mismatched[[5, 2, 2, 9, 21]], **close, err_msg=case.name)


def refusals(folder: str) -> None:
    pairs = lists_of(make_pairs())

    def compute(case: Case, folder: str, pairs: Any, groups: ProcessGroups) -> None:
        foreign = build_foreign(case, Path(folder), groups)
        score = lambda rows=pairs, **options: plugin.score(foreign.model, rows, **{"tokens_per_microbatch": 600} | options)  # noqa: E731
        run_the_page(foreign, pairs, groups)
        data = collection(make_pairs())
        keep = lambda name: plugin.score_reference(foreign.model, data, build_objective(name, {}), tokens_per_microbatch=60)  # noqa: E731
        with pytest.raises(ConfigError, match=r"pair .* of the pairs in memory needs .* tokens in one pack"):
            score(tokens_per_microbatch=20)
        with pytest.raises(ConfigError, match=r"takes 257 positions, and the model has 256 \(max_sequence_length\)"):
            score([(range(3, 60), range(3, 80), [3] * 201)])
        score([(range(3, 60), range(3, 80), [3] * 200)])
        with pytest.raises(ConfigError, match=f"token {VOCAB} is none of the model's vocabulary \\(vocab_size {VOCAB}\\)"):
            score([([1], [2, VOCAB], [3])])
        for rows, message in (
            ([], "there are no pairs"),
            ([([1], [2])], "pair 0 of the pairs in memory has 2 parts"),
            ([([1], [2], []), ([], [2], [3])], "pair 1 of the pairs in memory has no prompt"),
            ([([1], [-100, 2], [])], "the token id -100; ids begin at 0"),
            (
                [([1], [2], [3]), ("what?", "this", "that")],
                "pair 1 of the pairs in memory holds .*'what\\?'.* where a token id is expected",
            ),
            ([{"prompt": [1], "chosen": [2], "rejected": [3]}], "pair 0 of the pairs in memory holds .*'prompt'"),
            ([([1], [2], [3.5])], "pair 0 of the pairs in memory holds .*3.5"),
        ):
            with pytest.raises(DataError, match=message):
                score(rows)
        for name, message in (("simpo", "it compares with none"), ("epsilon_dpo", "keeps its reference in memory")):
            with pytest.raises(ConfigError, match=message):
                plugin.score_reference(
                    foreign.model, collection(make_pairs()), build_objective(name, {}), tokens_per_microbatch=60
                )
        with pytest.raises(ConfigError, match=r"'data/pairs' cannot keep them. .*open_pairs"):
            plugin.score_reference(foreign.model, "data/pairs", build_objective("dpo", {}), tokens_per_microbatch=60)  # type: ignore[arg-type]
        with torch.no_grad():
            foreign.model.module.decoder.final_layernorm.weight[0] = torch.nan
        with pytest.raises(DataError, match=r"pair 0 of memory has the log-probs .nan, nan. under the reference"):
            keep("dpo")
        plugin.detach(foreign.model)
        with pytest.raises(ConfigError, match=r"this GPTModel takes no packed rows yet. Call megatron_rmipo.plugin.attach\("):
            score()

    run_at_layouts(compute, [Case("TP 1")], folder, pairs)


def run_the_page(foreign: Foreign, rows: list[Any], groups: ProcessGroups) -> None:
    """The examples of docs/plugin/log_probs.md as they stand there, and that their forms agree."""
    plugin.detach(foreign.model)
    head = foreign.model.module.output_layer
    hidden, target = torch.randn(7, head.weight.shape[1]), torch.arange(7)
    names = {
        "model": foreign.model,
        "vocab_size": VOCAB,
        "rows": rows,
        "bos": BOS,
        "pairs": collection(make_pairs()),
        "objective": build_objective("dpo", {}),
        "tp_group": groups.tp,
        "hidden": hidden,
        "output_layer": head,
        "logits": hidden @ head.weight.t(),
        "target": target,
        "reference_hidden": hidden,
        "reference_weight": head.weight.detach(),
    }
    page = (Path(__file__).parents[2] / "docs" / "plugin/log_probs.md").read_text()
    found = []
    for example in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(example, names)
        found += [names[name] for name in ("logprobs", "policy", "frozen", "extrapolated", "interpolated") if name in names]
    assert len(found) == 7
    for logprobs in found:
        torch.testing.assert_close(logprobs, found[0])
    assert np.array_equal(names["scores"].logps, names["pairs"].scores_of(np.arange(24)))  # type: ignore[attr-defined]
    assert names["batches"].peek().num_pairs == 24  # type: ignore[attr-defined]


@pytest.mark.dist
def test_the_page_runs_and_what_cannot_be_scored_is_said_before_it_is_tried(tmp_path: Path) -> None:
    run_distributed(refusals, 1, str(make_hf_model(tmp_path / "model")))


def test_every_public_name_is_there() -> None:
    assert sorted(plugin._PUBLIC) == plugin.__all__
    for name in plugin.__all__:
        assert getattr(plugin, name).__name__ in (name, f"{name}_model")
    with pytest.raises(AttributeError, match="no attribute 'attach_me'"):
        _ = plugin.attach_me


def test_pairs_in_memory_stand_for_a_data_set() -> None:
    store = PairsInMemory([([1, 2], [3], []), ([4], [5, 6], [7])])
    assert store.lengths.tolist() == [[2, 1, 0], [1, 2, 1]]
    assert store[1].chosen.tolist() == [5, 6]
    pairs = PairCollection([store])  # type: ignore[list-item]
    pairs.match_anew()
    assert pairs.mismatched is not None
    assert pairs.mismatched[1].prompt.tolist() == [4]
    assert pairs.mismatched[1].chosen.tolist() == [3]
