"""Answers of the policy: those of transformers where greedy, drawn by the seed alone where not, the same at every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.model.logprobs import head_tokens
from megatron_rmipo.model.vocabulary_shard import LogitRules, TokenChoice, VocabularyShard
from megatron_rmipo.passes.answers import Answer, answer_prompts
from megatron_rmipo.runtime.groups import ProcessGroups
from tests.harness import run_distributed
from tests.integration.problem import BOS, VOCAB, collection, make_hf_model, make_pairs
from tests.integration.worlds import Case, build_batches, build_state, run_at_layouts

MOST_TOKENS = 9
# Rows of few tokens: several a rank, and with two replicas not as many on both.
CASES = [
    Case("replicas", tokens_per_microbatch=30),
    Case("tensor", tp=2, sequence_parallel=True, tokens_per_microbatch=44),
    Case("stages", pp=2, tokens_per_microbatch=40),
    Case("interleaved", pp=2, split={"num_virtual_stages_per_pipeline_rank": 2}),
    Case("context", cp=2, tokens_per_microbatch=60),
]


def prompts() -> list[list[int]]:
    random = np.random.default_rng(3)
    return [[BOS, *random.integers(3, VOCAB, size=1 + 3 * number).tolist()] for number in range(5)]


def answers(case: Case, folder: str, pairs: PairCollection, groups: ProcessGroups, ends: list[int]) -> dict[str, Any]:
    state = build_state(case, Path(folder), groups)
    state.model.eval()
    layout = build_batches(case, pairs, state.policy, groups).layout
    found = {}
    for name, temperature in (("greedy", 0.0), ("drawn", 1.3)):
        choice = TokenChoice(temperature, 7, VOCAB)
        options: dict[str, Any] = {"ends": ends, "choice": choice, "layout": layout, "groups": groups}
        found[name] = answer_prompts(state.model, prompts(), most_tokens=MOST_TOKENS, **options)
    found["stopped"] = answer_prompts(state.model, prompts(), most_tokens=2, goes_on=lambda: False, **options)
    return found


def at_every_layout(folder: str, ends: list[int]) -> list[Any]:
    def compute(case: Case, folder: str, pairs: PairCollection, groups: ProcessGroups) -> dict[str, Any]:
        return answers(case, folder, pairs, groups, ends)

    return run_at_layouts(compute, CASES, folder, collection(make_pairs(2)))


def generated(folder: Path, prompt: list[int], ends: list[int]) -> list[int]:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = {"max_new_tokens": MOST_TOKENS, "do_sample": False, "eos_token_id": ends or None, "pad_token_id": 0}
    return model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


@pytest.mark.dist
@pytest.mark.slow
def test_answers_are_those_of_transformers_at_every_layout(tmp_path: Path) -> None:
    folder = make_hf_model(tmp_path / "model")
    # What ends an answer comes early in one of them.
    ends = [generated(folder, prompts()[1], [-1])[3]]
    expected = []
    for prompt in prompts():
        tokens = generated(folder, prompt, ends)
        ended = tokens[-1] in ends
        expected.append(Answer(tokens[:-1] if ended else tokens, ended))
    assert len({len(answer.token_ids) for answer in expected}) > 1
    first, second = run_distributed(at_every_layout, 2, str(folder), ends)
    assert [found["greedy"] for found in first] == [expected] * len(CASES)
    assert first == second
    drawn = [found["drawn"] for found in first]
    assert drawn == drawn[:1] * len(CASES)
    assert drawn[0] != expected
    assert [found["stopped"] for found in first] == [None] * len(CASES)


@pytest.mark.parametrize("rules", [LogitRules(), LogitRules(multiplier=0.5, softcap=2.0)])
def test_the_likeliest_token_is_that_of_all_logits_but_padding(rules: LogitRules) -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(13, 6), torch.randn(24, 6)
    weight[19:] *= 100.0
    logits = rules.apply_(hidden @ weight[:19].t())
    for size in (1, 7, 19, 64):
        found = head_tokens(hidden, weight, VocabularyShard(24, 19, None), TokenChoice(0.0, 0, 19), chunk_size=size, rules=rules)
        assert found.tolist() == logits.argmax(dim=1).tolist()


def test_drawn_tokens_are_as_frequent_as_the_softmax_says_and_repeat_by_seed_and_place() -> None:
    torch.manual_seed(2)
    hidden, weight = torch.randn(1, 6).expand(4000, 6), torch.randn(5, 6)
    shard = VocabularyShard(5, 5, None)

    def drawn(temperature: float, seed: int) -> torch.Tensor:
        choice = TokenChoice(temperature, seed, 5).at((number % 40, number // 40) for number in range(4000))
        return head_tokens(hidden, weight, shard, choice, chunk_size=2)

    for temperature in (0.7, 2.0):
        shares = torch.bincount(drawn(temperature, 5), minlength=5) / 4000
        # Four standard errors of a share near one half.
        torch.testing.assert_close(shares, torch.softmax(hidden[0] @ weight.t() / temperature, 0), atol=0.032, rtol=0.0)
    assert torch.equal(drawn(0.7, 5), drawn(0.7, 5))
    assert not torch.equal(drawn(0.7, 5), drawn(0.7, 6))
