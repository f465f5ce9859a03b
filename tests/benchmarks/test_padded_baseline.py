"""The baseline's losses, against the objective fed with log-probs taken sequence by sequence, without padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from benchmarks.padded_baseline import ObjectiveName, PaddedBaseline, Pair
from megatron_rmipo.objectives.base import PairLogps
from megatron_rmipo.objectives.registry import build_objective

BOS = 1


def make_pairs() -> list[Pair]:
    generator = torch.Generator().manual_seed(3)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 50, (count,), generator=generator).tolist()

    return [([BOS, *tokens(p)], tokens(c), tokens(r)) for p, c, r in ((4, 7, 2), (1, 3, 11), (9, 1, 5))]


def random_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def alone(model: torch.nn.Module, context: list[int], response: list[int]) -> float:
    logps = model(torch.tensor([context + response])).logits[0].double().log_softmax(-1)
    return sum(logps[len(context) - 1 + number, token].item() for number, token in enumerate(response))


@pytest.mark.parametrize("objective", ["rmipo", "simpo"])
def test_losses_and_the_split_into_microbatches(objective: ObjectiveName) -> None:
    model, pairs = random_model(), make_pairs()
    sums = torch.tensor(
        [
            [alone(model, prompt, c), alone(model, prompt, r), alone(model, [BOS], c), alone(model, [BOS], r)]
            for prompt, c, r in pairs
        ]
    )
    lengths = torch.tensor([[len(c), len(r)] for _, c, r in pairs], dtype=torch.float32)
    chosen, rejected = lengths[:, 0], lengths[:, 1]
    logps = PairLogps(sums[:, 0], sums[:, 1], chosen, rejected, chosen.mean(), sums[:, 2], sums[:, 3], chosen, rejected)
    expected = build_objective(objective, {})(logps).losses
    norms = []
    for size in (1, 2, 3):
        copy = transformers.LlamaForCausalLM(model.config)
        copy.load_state_dict(model.state_dict())
        result = PaddedBaseline(copy, objective=objective, bos_token_id=BOS, pairs_per_microbatch=size).step(pairs)
        torch.testing.assert_close(result.losses, expected, rtol=1e-5, atol=1e-5)
        norms.append(result.grad_norm)
    assert max(norms) - min(norms) < 1e-4 * max(norms)
