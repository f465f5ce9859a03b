"""Counted FLOPs against torch's own counter over a plain transformer that computes exactly what is needed, query by query."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_rmipo.model.architecture import ModelArchitecture
from megatron_rmipo.training.flops import pair_flops, peak_flops

ARCH = ModelArchitecture(
    family="llama",
    num_layers=2,
    hidden_size=20,
    ffn_hidden_size=28,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=6,
    vocab_size=37,
    max_position_embeddings=64,
    rotary_base=10000.0,
    layernorm_epsilon=1e-5,
)


class PlainModel(torch.nn.Module):
    """Matrix products alone: what a count of model FLOPs is made of."""

    def __init__(self, arch: ModelArchitecture) -> None:
        super().__init__()
        self.arch = arch
        heads, groups, size, hidden = arch.num_attention_heads, arch.num_query_groups, arch.kv_channels, arch.hidden_size
        shapes = {
            "q": (hidden, heads * size),
            "k": (hidden, groups * size),
            "v": (hidden, groups * size),
            "o": (heads * size, hidden),
            "gate": (hidden, arch.ffn_hidden_size),
            "up": (hidden, arch.ffn_hidden_size),
            "down": (arch.ffn_hidden_size, hidden),
        }
        layers = [
            {name: torch.nn.Parameter(torch.randn(shape) * 0.1) for name, shape in shapes.items()} for _ in range(arch.num_layers)
        ]
        self.layers = torch.nn.ModuleList(torch.nn.ParameterDict(layer) for layer in layers)
        self.embedding = torch.nn.Parameter(torch.randn(arch.vocab_size, hidden))
        self.head = torch.nn.Parameter(torch.randn(hidden, arch.vocab_size))

    def forward(self, tokens: Tensor, visible: list[list[int]], sources: list[int]) -> Tensor:
        x = self.embedding[tokens]
        for layer in self.layers:
            x = x + self.attention(x, layer, visible)
            x = x + torch.mm(torch.mm(x, layer["gate"]) * torch.mm(x, layer["up"]), layer["down"])
        return torch.mm(x[sources], self.head)

    def attention(self, x: Tensor, layer: torch.nn.ParameterDict, visible: list[list[int]]) -> Tensor:
        size, share = self.arch.kv_channels, self.arch.num_attention_heads // self.arch.num_query_groups
        q, k, v = torch.mm(x, layer["q"]), torch.mm(x, layer["k"]), torch.mm(x, layer["v"])
        rows = []
        for query, keys in enumerate(visible):
            outputs = []
            for head in range(self.arch.num_attention_heads):
                columns = slice(head // share * size, (head // share + 1) * size)
                scores = torch.mm(q[query : query + 1, head * size : (head + 1) * size], k[keys, columns].T)
                outputs.append(torch.mm(scores.softmax(-1), v[keys, columns]))
            rows.append(torch.cat(outputs, 1))
        return torch.mm(torch.cat(rows), layer["o"])


def row(prompt: int, responses: list[int], *, share: bool) -> tuple[list[list[int]], list[int]]:
    """(visible keys of each token, source of each scored token) of one pair."""
    visible: list[list[int]] = []
    sources: list[int] = []
    shared_prompt: list[int] = []
    for number, response in enumerate(responses):
        prefix = list(shared_prompt)
        count = response - 1 if prefix else prompt + response - 1
        for _ in range(count):
            visible.append([*prefix, len(visible)])
            prefix = visible[-1]
        before_response = shared_prompt or prefix[:prompt]
        sources += [*before_response[-1:], *(prefix[len(prefix) - response + 1 :] if response > 1 else [])]
        if share and number == 0:
            shared_prompt = prefix[:prompt]
    return visible, sources


def counted(model: PlainModel, visible: list[list[int]], sources: list[int], *, backward: bool) -> int:
    tokens = torch.arange(len(visible)) % ARCH.vocab_size
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        logits = model(tokens, visible, sources)
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


LENGTHS = [(5, 4, 3), (3, 2, 6), (1, 1, 4)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("share", [True, False])
def test_gradient_pass(lengths: tuple[int, int, int], share: bool) -> None:
    model = PlainModel(ARCH)
    prompt, *responses = lengths
    visible, sources = row(prompt, responses, share=share)
    assert len(sources) == sum(responses)
    flops = pair_flops(ARCH, np.array([lengths]), share_prompts=share)
    assert flops.tolist() == [counted(model, visible, sources, backward=True)]
    forward = pair_flops(ARCH, np.array([lengths]), share_prompts=share, forward_only=True)
    assert forward.tolist() == [counted(model, visible, sources, backward=False)]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_chosen_alone(lengths: tuple[int, int, int]) -> None:
    visible, sources = row(lengths[0], [lengths[1]], share=True)
    flops = pair_flops(ARCH, np.array([lengths]), with_rejected=False)
    assert flops.tolist() == [counted(PlainModel(ARCH), visible, sources, backward=True)]


@pytest.mark.parametrize("context", ["bos", "none"])
def test_unconditional_pass_is_forward_only_over_the_responses(context: str) -> None:
    model = PlainModel(ARCH)
    extra = pair_flops(ARCH, np.array(LENGTHS), unconditional=context) - pair_flops(ARCH, np.array(LENGTHS))
    for (_, *responses), flops in zip(LENGTHS, extra, strict=True):
        expected = 0
        for response in responses:
            tokens = response if context == "bos" else response - 1
            if tokens:
                visible = [list(range(query + 1)) for query in range(tokens)]
                expected += counted(model, visible, list(range(tokens)), backward=False)
        assert flops == expected


def test_pairs_are_counted_one_by_one() -> None:
    together = pair_flops(ARCH, np.array(LENGTHS), unconditional="bos")
    alone = [pair_flops(ARCH, np.array([lengths]), unconditional="bos")[0] for lengths in LENGTHS]
    assert together.tolist() == alone


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H200", torch.float32, 66.9e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA L40S", torch.bfloat16, 362e12),
        ("NVIDIA GeForce RTX 4090", torch.float16, 165.2e12),
        ("NVIDIA H100 80GB HBM3", torch.float64, None),
        ("Some Device 100", torch.bfloat16, None),
        ("NVIDIA A1000", torch.bfloat16, None),
    ],
)
def test_peaks(name: str, dtype: torch.dtype, expected: float | None) -> None:
    assert peak_flops(name, dtype) == expected
