"""What of a model that somebody else built cannot be scored exactly, and is refused before anything of it changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.model.adopt import attach_model, detach_model
from megatron_rmipo.model.packed_model import ScoringOptions
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime
from tests.harness import run_distributed
from tests.model.built import PADDED, VOCAB, Built, LoRALinear, add_adapters, build


class ScaledLogits(GPTModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().forward(*args, **kwargs)


class BridgedLogits(ScaledLogits):
    """As a class of Megatron-Bridge, which is in the namespace of Megatron-Core."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)

    forward.__module__ = "megatron.bridge.models"


def change(path: str, value: Any) -> Callable[[Any], None]:
    """Sets what lies there in a model: an attribute, or a module in the place of another."""

    def apply(model: Any) -> None:
        *parents, name = path.split(".")
        for parent in parents:
            model = model[int(parent)] if parent.isdigit() else getattr(model, parent)
        if isinstance(value, torch.nn.Module):
            model._modules[name] = value
        else:
            setattr(model, name, value)

    return apply


def changes(*several: Callable[[Any], None]) -> Callable[[Any], None]:
    def apply(model: Any) -> None:
        for one in several:
            one(model)

    return apply


class OtherCore(torch.nn.Module):
    pass


class OtherAttention(torch.nn.Module):
    pass


class OtherRotary(torch.nn.Module):
    def forward(self, length: int) -> Tensor:
        return torch.zeros(length, 1, 1, 8)


class Mamba(torch.nn.Module):
    pass


REFUSED = [
    (change("config.hidden_dropout", 0.1), r"hidden_dropout: dropout of 0\.1"),
    (change("embedding.embedding_dropout.p", 0.2), r"embedding\.embedding_dropout: dropout of 0\.2"),
    (change("config.context_parallel_size", 2), "context_parallel_size 2"),
    (change("config.mtp_num_layers", 1), "mtp_num_layers 1: .*a loss of its own"),
    (change("config.multi_latent_attention", True), "multi_latent_attention"),
    (change("config.softmax_type", "off-by-one"), "softmax_type 'off-by-one'"),
    (change("config.window_size", (4, 2)), r"decoder\.layers\.2\.self_attention: .* window_size \(4, 2\) is not causal"),
    (change("config.moe_expert_capacity_factor", 1.5), r"moe_expert_capacity_factor 1\.5"),
    (
        changes(change("config.num_moe_experts", 4), change("config.moe_router_load_balancing_type", ["aux_loss", "sinkhorn"])),
        "load_balancing_type sinkhorn",
    ),
    (change("config.cuda_graph_impl", "local"), "cuda_graph_impl 'local'"),
    (change("config.tp_comm_overlap", True), "tp_comm_overlap fixes the length of rows"),
    (
        changes(change("config.num_moe_experts", 4), change("config.moe_router_force_load_balancing", True)),
        "moe_router_force_load_balancing gives tokens to experts by chance",
    ),
    (change("output_layer", torch.nn.Linear(2, 2)), "output_layer: it is a Linear"),
    (change("output_layer.bias", torch.nn.Parameter(torch.zeros(PADDED))), "output_layer: it has a bias"),
    (lambda model: change("output_layer", LoRALinear(model.output_layer))(model), "output_layer: it is a LoRALinear"),
    (
        partial(add_adapters, dropout=0.1),
        r"layers\.0\.mlp\.linear_fc1\.adapter\.0: dropout of 0\.1(.|\n)*and 4 more$",
    ),
    (change("decoder.layers.1.forward", print), r"decoder\.layers\.1: TransformerLayer\.forward was replaced in this object"),
    (change("rotary_pos_emb", OtherRotary()), r"rotary_pos_emb: OtherRotary\.forward of tests.* is not Megatron-Core's"),
    (change("position_embedding_type", "mrope"), "rotary_pos_emb: positions of the kind 'mrope'"),
    (change("decoder.layers.1", Mamba()), r"decoder\.layers\.1: Mamba is no TransformerLayer"),
    (change("decoder.layers.2.self_attention", OtherAttention()), r"decoder\.layers\.2\.self_attention: OtherAttention is not"),
    (change("decoder.layers.0.self_attention.core_attention", OtherCore()), r"0\.self_attention\.core_attention: .* OtherCore"),
    (change("decoder.layers.1.self_attention.attn_mask_type", AttnMaskType.no_mask), "its mask is no_mask"),
    (change("__class__", ScaledLogits), "ScaledLogits.forward of tests.model.test_adopt_refusals is not"),
    (change("__class__", BridgedLogits), "BridgedLogits.forward of megatron.bridge.models is not Megatron-Core's"),
]


@pytest.mark.dist
def test_what_cannot_be_scored_exactly_is_refused_before_anything_changes() -> None:
    run_distributed(refusals, 1)


def refusals() -> None:
    groups = initialize_runtime()
    for alter, message in REFUSED:
        model = build(Built(), groups)
        alter(model)
        before = [dict(vars(module)) for module in model.modules()]
        with pytest.raises(ConfigError, match=message):
            attach_model(model, vocab_size=VOCAB)
        assert before == [vars(module) for module in model.modules()]
    for vocab_size in (0, PADDED + 1):
        with pytest.raises(ConfigError, match=f"vocab_size {vocab_size}: the model has {PADDED} tokens, padding among them"):
            attach_model(build(Built(), groups), vocab_size=vocab_size)
    with pytest.raises(ConfigError, match="this GPTModel is not attached"):
        detach_model(build(Built(), groups))
    whole, chunks = build(Built(), groups), [build(Built(), groups) for _ in range(2)]
    chunks[1].config.hidden_dropout = 0.1
    with pytest.raises(ConfigError, match="hidden_dropout"):
        attach_model(chunks, vocab_size=VOCAB)
    attach_model([whole, chunks[0]], vocab_size=VOCAB)
    with pytest.raises(ConfigError, match="it takes packed rows already; to attach it otherwise, detach it first"):
        attach_model(whole, vocab_size=VOCAB)
    policy = build(Built(), groups)
    # As our own have it, which nobody attached.
    policy.scoring_options = ScoringOptions(VOCAB)
    with pytest.raises(ConfigError, match="it takes packed rows already; leave attach out"):
        attach_model(policy, vocab_size=VOCAB)
    with pytest.raises(ConfigError, match="This Linear cannot be scored"):
        attach_model(torch.nn.Linear(2, 2), vocab_size=VOCAB)
    shutdown_runtime()
