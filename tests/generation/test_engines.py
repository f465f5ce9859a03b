"""What computes answers: each depends on its own request alone, whatever is answered beside it."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.generation.engines import build_engine, choose_engine
from megatron_rmipo.generation.requests import Completion, Request
from megatron_rmipo.generation.transformers_engine import RowSampler, TransformersEngine
from tests.generation.models import save_chat_model

ENDS = {4, 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


def requests(temperature: float, top_p: float = 1.0) -> list[Request]:
    lengths = (3, 17, 8, 30, 5)
    return [
        Request([(5 + 7 * n * i) % 590 + 5 for i in range(length)], temperature, top_p, 9 + n, 100 + n)
        for n, length in enumerate(lengths)
    ]


def test_greedy_answers_are_those_of_the_model_token_by_token(model: Path) -> None:
    engine = TransformersEngine(model, ENDS, dtype="fp32", batch_size=None)
    dense: Any = AutoModelForCausalLM.from_pretrained(model).double().eval()
    for request, found in zip(requests(0.0), engine.generate(requests(0.0)), strict=True):
        ids = list(request.prompt_ids)
        for _ in range(request.max_tokens):
            with torch.no_grad():
                ids.append(int(dense(torch.tensor([ids])).logits[0, -1].argmax()))
        assert found == Completion.cut(ids[len(request.prompt_ids) :], ENDS, request.max_tokens)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_sampled_answers_do_not_depend_on_the_batch(model: Path, top_p: float) -> None:
    engine = TransformersEngine(model, ENDS, dtype="fp32", batch_size=None)
    wanted = requests(1.3, top_p)
    together = engine.generate(wanted)
    assert [engine.generate([request])[0] for request in wanted] == together
    assert engine.generate(wanted[::-1]) == together[::-1]
    other_seeds = [Request(r.prompt_ids, r.temperature, r.top_p, r.max_tokens, r.seed + 50) for r in wanted]
    assert engine.generate(other_seeds) != together


def test_samples_are_distributed_as_the_logits_say() -> None:
    logits = torch.tensor([1.0, 0.2, -0.5, 2.0, -3.0])
    counts = torch.zeros(2, 5)
    samplers = RowSampler([Request([1], 0.7, 1.0, 1, 3), Request([1], 0.7, 0.85, 1, 4)])
    for _ in range(4000):
        rows = samplers(torch.zeros(2, 1), torch.stack([logits, logits])).argmax(-1)
        counts[torch.arange(2), rows] += 1
    shares = torch.softmax(logits.double() / 0.7, -1)
    # Of a share of 0.15 four standard errors are 0.023.
    torch.testing.assert_close(counts[0].double() / 4000, shares, rtol=0, atol=0.025)
    # The two most probable have 0.92 together, the first alone 0.74.
    kept = torch.where(torch.tensor([True, False, False, True, False]), shares, 0.0)
    torch.testing.assert_close(counts[1].double() / 4000, kept / kept.sum(), rtol=0, atol=0.025)


def test_an_answer_is_cut_at_its_first_end() -> None:
    assert Completion.cut([7, 4, 8, 4], {4}, 9) == Completion([7], ended=True)
    assert Completion.cut([7, 8, 4], {4}, 2) == Completion([7, 8], ended=False)
    assert Completion.cut([4], {4}, 2) == Completion([], ended=True)


class PretendedVllm(types.ModuleType):
    """As far as the adapter uses it; answers with the prompt's ids, ended."""

    def __init__(self) -> None:
        super().__init__("vllm")
        self.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
        module = self
        self.made: dict[str, Any] = {}
        self.asked: list[Any] = []

        class LLM:
            def __init__(self, **settings: Any) -> None:
                module.made = settings

            def generate(self, prompts: list[Any], settings: list[Any], use_tqdm: bool) -> list[Any]:
                module.asked = list(zip(prompts, settings, strict=True))
                ids = [[*prompt["prompt_token_ids"][:3], 4] for prompt in prompts]
                return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tuple(one))]) for one in ids]

        self.LLM, self.SamplingParams = LLM, lambda **settings: settings


def test_vllm_is_told_everything_and_its_answers_are_cut(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    assert choose_engine("auto") == "transformers"
    with pytest.raises(ConfigError, match="vLLM is not installed"):
        choose_engine("vllm")
    vllm = PretendedVllm()
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.delitem(sys.modules, "megatron_rmipo.generation.vllm_engine", raising=False)
    assert choose_engine("auto") == "vllm"
    engine = build_engine("vllm", model, ENDS, dtype="bf16", batch_size=None, tensor_model_parallel_size=2)
    found = engine.generate(requests(0.5, 0.9)[:2])
    assert [completion.token_ids for completion in found] == [[10, 10, 10], [10, 17, 24]]
    assert all(completion.ended for completion in found)
    assert vllm.made == {"model": str(model), "dtype": "bfloat16", "tensor_parallel_size": 2, "generation_config": "vllm"}
    _, settings = vllm.asked[1]
    assert settings == {"temperature": 0.5, "top_p": 0.9, "max_tokens": 10, "seed": 101, "stop_token_ids": [1, 4]}
    monkeypatch.delitem(sys.modules, "megatron_rmipo.generation.vllm_engine")


def test_what_an_engine_cannot_do_is_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ConfigError, match="uses one device"):
        build_engine("transformers", model, ENDS, dtype="fp32", batch_size=1, tensor_model_parallel_size=2)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build_engine("transformers", tmp_path, ENDS, dtype="fp32", batch_size=1, tensor_model_parallel_size=1)
