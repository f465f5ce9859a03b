"""Counted FLOPs against torch's own counter over a plain transformer that computes exactly what is needed, query by query."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_rmipo.config.flags.lora import LoraConfig
from megatron_rmipo.data.batches.batch_builder import BatchBuilder
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.store.pair_store import TokenizedPair
from megatron_rmipo.families.architecture import Experts, LatentAttention, LayerKind, ModelArchitecture, Rope
from megatron_rmipo.families.tensors import megatron_shape, rules_of
from megatron_rmipo.model.flops import forward_cost_model, peak_flops
from tests.integration.problem import collection

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
    ropes=(Rope(10000.0),),
    layernorm_epsilon=1e-5,
)


class PlainModel(torch.nn.Module):
    """Matrix products alone: what a count of model FLOPs is made of."""

    def __init__(self, arch: ModelArchitecture, lora: LoraConfig | None = None) -> None:
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
        if lora is not None:
            self.add_adapters(lora)

    def add_adapters(self, lora: LoraConfig) -> None:
        """Freeze all weights but those of modules to save, and give those that are targeted their A and B."""
        assert lora.lora_rank is not None
        self.requires_grad_(False)
        for layer in self.layers:
            for name, weight in list(layer.items()):
                if f"{name}_proj" in (lora.lora_target_modules or []):
                    layer[f"{name}_A"] = torch.nn.Parameter(torch.randn(weight.shape[0], lora.lora_rank))
                    layer[f"{name}_B"] = torch.nn.Parameter(torch.randn(lora.lora_rank, weight.shape[1]))
                weight.requires_grad_(f"{name}_proj" in (lora.lora_modules_to_save or []))
        self.head.requires_grad_("lm_head" in (lora.lora_modules_to_save or []))

    def forward(self, tokens: Tensor, visible: list[list[int]], sources: list[int]) -> Tensor:
        x = self.embedding[tokens]
        if torch.is_grad_enabled() and not x.requires_grad:
            x.requires_grad_()
        for number, layer in enumerate(self.layers):
            window = self.arch.kind_of(number).window
            x = x + self.attention(x, layer, [keys if window is None else keys[-window:] for keys in visible])
            x = x + product(product(x, layer, "gate") * product(x, layer, "up"), layer, "down")
        return torch.mm(x[sources], self.head)

    def attention(self, x: Tensor, layer: torch.nn.ParameterDict, visible: list[list[int]]) -> Tensor:
        size, share = self.arch.kv_channels, self.arch.num_attention_heads // self.arch.num_query_groups
        q, k, v = (product(x, layer, name) for name in "qkv")
        rows = []
        for query, keys in enumerate(visible):
            outputs = []
            for head in range(self.arch.num_attention_heads):
                columns = slice(head // share * size, (head // share + 1) * size)
                scores = torch.mm(q[query : query + 1, head * size : (head + 1) * size], k[keys, columns].T)
                outputs.append(torch.mm(scores.softmax(-1), v[keys, columns]))
            rows.append(torch.cat(outputs, 1))
        return product(torch.cat(rows), layer, "o")


def product(x: Tensor, layer: torch.nn.ParameterDict, name: str) -> Tensor:
    plain = torch.mm(x, layer[name])
    return plain + torch.mm(torch.mm(x, layer[f"{name}_A"]), layer[f"{name}_B"]) if f"{name}_A" in layer else plain


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


def pair_flops(
    lengths: tuple[int, int, int], *, arch: ModelArchitecture = ARCH, lora: LoraConfig | None = None, **layout: Any
) -> float:
    """What a batch of one pair says that it costs."""
    pair = TokenizedPair(*(np.arange(length) + 3 for length in lengths))
    settings = {"tokens_per_microbatch": 100, "bos_token_id": 1, **layout}
    cost = forward_cost_model(arch, lora)
    builder = BatchBuilder(collection([pair]), BatchLayout(dp_rank=0, dp_size=1, cost=cost, **settings))
    return builder.build(np.array([0])).cost


LENGTHS = [(5, 4, 3), (3, 2, 6), (1, 1, 4)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("share", [True, False])
def test_gradient_pass(lengths: tuple[int, int, int], share: bool) -> None:
    model = PlainModel(ARCH)
    prompt, *responses = lengths
    visible, sources = row(prompt, responses, share=share)
    assert len(sources) == sum(responses)
    flops = pair_flops(lengths, share_prompts=share)
    assert flops == counted(model, visible, sources, backward=True)
    forward = counted(model, visible, sources, backward=False)
    assert pair_flops(lengths, share_prompts=share, forward_passes=2) == flops + 2 * forward


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(lora_rank=3, lora_target_modules=[f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]),
        LoraConfig(lora_rank=2, lora_target_modules=["q_proj", "up_proj"]),
        LoraConfig(lora_rank=5, lora_target_modules=["v_proj"], lora_modules_to_save=["o_proj", "lm_head"]),
    ],
    ids=["all", "some", "whole ones beside"],
)
def test_frozen_weights_have_no_gradient(lengths: tuple[int, int, int], lora: LoraConfig) -> None:
    model = PlainModel(ARCH, lora)
    visible, sources = row(lengths[0], list(lengths[1:]), share=True)
    flops = pair_flops(lengths, lora=lora)
    assert flops == pytest.approx(counted(model, visible, sources, backward=True), rel=1e-12)
    assert flops < pair_flops(lengths)
    # An adapter that is off is none.
    assert pair_flops(lengths, lora=LoraConfig()) == pair_flops(lengths)


def test_a_token_goes_through_the_adapters_of_its_experts() -> None:
    arch = dataclasses.replace(ARCH, family="qwen3_moe", experts=Experts(6, 2, 14))
    for form in ("each", "shared"):
        lora = LoraConfig(lora_rank=3, lora_target_modules=["gate_up_proj", "down_proj"], lora_experts=form)
        more = forward_cost_model(arch, lora).per_token - forward_cost_model(arch).per_token
        # Gate and up share their A.
        assert more == 2 * 2 * 2 * 3 * ((20 + 2 * 14) + (14 + 20))


@pytest.mark.parametrize("window", [1, 3, 6, 50])
@pytest.mark.parametrize("share", [True, False])
def test_layers_with_windows(window: int, share: bool) -> None:
    arch = dataclasses.replace(ARCH, layer_kinds=(LayerKind(window), LayerKind()))
    for lengths in LENGTHS:
        prompt, *responses = lengths
        visible, sources = row(prompt, responses, share=share)
        assert pair_flops(lengths, arch=arch, share_prompts=share) == counted(PlainModel(arch), visible, sources, backward=True)


@pytest.mark.parametrize("q_lora_rank", [7, None])
def test_latent_attention(q_lora_rank: int | None) -> None:
    """Every matrix of a layer once a token; queries and keys are as wide as one another, values are not."""
    latent = LatentAttention(q_lora_rank, kv_lora_rank=9, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=5)
    arch = dataclasses.replace(ARCH, family="deepseek_v3", num_query_groups=4, latent=latent)
    for model in (ARCH, arch):
        matrices = [megatron_shape(rule, model) for rule in rules_of(model) if rule.per_layer]
        weights = sum(math.prod(shape) for shape in matrices if len(shape) == 2)
        assert forward_cost_model(model).per_token == 2 * model.num_layers * weights
    assert forward_cost_model(arch).per_area == 2 * arch.num_layers * 4 * (6 + 5)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_chosen_alone(lengths: tuple[int, int, int]) -> None:
    visible, sources = row(lengths[0], [lengths[1]], share=True)
    flops = pair_flops(lengths, with_rejected=False)
    assert flops == counted(PlainModel(ARCH), visible, sources, backward=True)


@pytest.mark.parametrize("context", ["bos", "none"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_unconditional_pass_is_forward_only_over_the_responses(lengths: tuple[int, int, int], context: str) -> None:
    model, expected = PlainModel(ARCH), 0
    for response in lengths[1:]:
        tokens = response if context == "bos" else response - 1
        if tokens:
            visible = [list(range(query + 1)) for query in range(tokens)]
            expected += counted(model, visible, list(range(tokens)), backward=False)
    assert pair_flops(lengths, unconditional=context) - pair_flops(lengths) == expected


def test_the_mismatched_pass_is_forward_only_over_prompts_with_other_responses() -> None:
    pairs = [
        TokenizedPair(*(np.arange(length) + first for length in lengths)) for first, lengths in ((3, (5, 4, 3)), (9, (3, 2, 6)))
    ]
    both, costs = collection(pairs), []
    layout = BatchLayout(dp_rank=0, dp_size=1, cost=forward_cost_model(ARCH), tokens_per_microbatch=100)
    for _ in range(2):
        costs.append(BatchBuilder(both, layout).build(np.arange(2)).cost)
        both.match_anew()
    # The second pair's longer response is cut to what the longest row, of nine tokens, leaves behind a prompt of five.
    expected = [row(5, [2, 4], share=True), row(3, [4, 3], share=True)]
    assert costs[1] - costs[0] == sum(counted(PlainModel(ARCH), *one, backward=False) for one in expected)


def test_of_experts_count_those_that_a_token_goes_through() -> None:
    experts = Experts(6, 2, 14, dense_layers=frozenset({0}), shared_ffn_hidden_size=10)
    sparse = forward_cost_model(dataclasses.replace(ARCH, experts=experts))
    plain = forward_cost_model(ARCH)
    # One layer has two experts of 14 channels, 10 shared ones and a router in the place of an MLP of 28.
    assert plain.per_token - sparse.per_token == 2 * 20 * (3 * (28 - 2 * 14 - 10) - 6)
    assert (sparse.per_area, sparse.per_scored_token) == (plain.per_area, plain.per_scored_token)


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
