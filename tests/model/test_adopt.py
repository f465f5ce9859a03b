"""Models built by Megatron's own specs, scored over packed rows, against their own forward pass before they were adopted."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.extensions import transformer_engine
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.model import adopt
from megatron_rmipo.model.adopt import attach_model, detach_model
from megatron_rmipo.model.hybrid import HybridModel, hybrid_config, hybrid_stack
from megatron_rmipo.model.layers.norms import RMSNorm
from megatron_rmipo.model.packed_model import ScoringOptions
from megatron_rmipo.runtime.groups import ProcessGroups, initialize_runtime, shutdown_runtime
from tests.harness import run_distributed

VOCAB, PADDED, LONGEST = 41, 44, 32
# Prompt, chosen and rejected response of each pair, in tokens.
PAIRS = [(5, 4, 3), (1, 2, 6), (7, 1, 1)]
YARN = {
    "yarn_rotary_scaling_factor": 4.0,
    "yarn_original_max_position_embeddings": 8,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_mscale": 1.0,
    "yarn_mscale_all_dim": 0.0,
    "yarn_correction_range_round_to_int": True,
}


@dataclasses.dataclass(frozen=True)
class Built:
    """How somebody else builds a model: arguments of its class, fields of its configuration, and whether it is a HybridModel."""

    model: dict[str, Any] = dataclasses.field(default_factory=lambda: {"position_embedding_type": "rope"})
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    hybrid: bool = False


KINDS = {
    "rope, tied": Built({"position_embedding_type": "rope", "share_embeddings_and_output_weights": True}),
    "part of the channels, interleaved, stretched": Built(
        {"position_embedding_type": "rope", "rotary_percent": 0.5, "seq_len_interpolation_factor": 2.0},
        {"rotary_interleaved": True, "add_qkv_bias": True, "softmax_scale": 0.3},
    ),
    "layers without rope": Built(config={"no_rope_freq": [0, 1, 0], "qk_layernorm": True}),
    "yarn": Built({"position_embedding_type": "yarn"}),
    "learned positions": Built({"position_embedding_type": "learned_absolute"}),
    "no positions": Built({"position_embedding_type": "none"}),
    # Shorter than most rows apart.
    "windows": Built(config={"window_size": (4, 0)}),
    "sinks, windows in every second layer": Built(
        config={"softmax_type": "learnable", "window_size": (2, 0), "window_attn_skip_freq": 2}
    ),
    "sinks, windows and rope in some layers": Built(
        config={"softmax_type": "learnable", "window_size": (0, 0), "window_attn_skip_freq": [0, 1, 0], "no_rope_freq": [1, 0, 0]}
    ),
}
KINDS["experts, score biases"] = Built(
    config={
        "num_moe_experts": 6,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 20,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "add_bias_linear": False,
    }
)
if HybridModel is not None:
    # Its third layer is the second with attention.
    KINDS["hybrid"] = Built(config={"softmax_type": "learnable", "window_size": (2, 0), "window_attn_skip_freq": 3}, hybrid=True)


def build(built: Built, groups: ProcessGroups, norm: Any = None) -> Any:
    torch.manual_seed(4)
    settings: dict[str, Any] = {
        "num_layers": 3,
        "hidden_size": 24,
        "ffn_hidden_size": 40,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": groups.tp_size,
        "sequence_parallel": groups.tp_size > 1,
        "use_cpu_initialization": True,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False,
        "init_method_std": 0.3,
        "normalization": "LayerNorm" if norm is None else "RMSNorm",
    }
    config = TransformerConfig(**{**settings, **built.config})
    if built.model.get("position_embedding_type") == "yarn":
        for name, value in YARN.items():
            setattr(config, name, value)
    further = {"max_sequence_length": LONGEST, "parallel_output": False, "pg_collection": groups.megatron_collection()}
    spec: Any = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    if norm is not None:
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
        spec = TransformerBlockSubmodules(layer_specs=[spec] * 3, layer_norm=norm)
    if built.hybrid:
        stack = hybrid_stack(spec, spec, RMSNorm)
        return HybridModel(hybrid_config(config), stack, PADDED, hybrid_layer_pattern="*-*-*-", **further, **built.model)
    return GPTModel(config, spec, PADDED, **further, **built.model)


def make_tokens(multiple_of: int) -> list[list[Tensor]]:
    """The pairs' prompts and responses; the last response is drawn out so that the packed row divides."""
    generator = torch.Generator().manual_seed(9)
    lengths = [list(pair) for pair in PAIRS]
    lengths[-1][2] += -sum(map(sum, lengths)) % multiple_of
    return [[torch.randint(VOCAB, (length,), generator=generator) for length in pair] for pair in lengths]


def apart(model: Any, pairs: list[list[Tensor]], multiple_of: int) -> Tensor:
    """Log-probs of every response token, each response in a row of its own through the model's own forward pass."""
    scores = []
    for prompt, *responses in pairs:
        for response in responses:
            tokens = torch.cat([prompt, response])
            # Causal, so that what stands behind changes nothing.
            filled = torch.nn.functional.pad(tokens, (0, -len(tokens) % multiple_of))
            logits = model(filled[None], torch.arange(len(filled))[None], None)[0, :, :VOCAB]
            picked = logits.log_softmax(-1)[: len(tokens) - 1].gather(1, tokens[1:, None])[:, 0]
            scores.append(picked[len(prompt) - 1 :])
    return torch.cat(scores)


def packed(model: Any, pairs: list[list[Tensor]]) -> Tensor:
    """The same in one row, each prompt once."""
    tokens, positions, segments, source, target = [], [], [], [], []
    start = 0
    for prompt, chosen, rejected in pairs:
        first, second = len(prompt), len(prompt) + len(chosen)
        segments += [[start, second, 0, 0], [start + second, len(rejected), start, first]]
        tokens += [prompt, chosen, rejected]
        positions += [torch.arange(second), torch.arange(first, first + len(rejected))]
        for place, response in ((first, chosen), (second, rejected)):
            source += [start + first - 1, *range(start + place, start + place + len(response) - 1)]
            target.append(response)
        start += second + len(rejected)
    row = {
        "token_ids": torch.cat(tokens),
        "position_ids": torch.cat(positions),
        "segments": torch.tensor(segments),
        "source": torch.tensor(source),
        "target": torch.cat(target),
    }
    # The last tokens of a row, whose outputs nothing reads but their own.
    uncounted = torch.arange(start) >= start - 3
    before = counts(model)
    scores = model(**row, uncounted=uncounted)
    assert counts(model) == [count + model.config.moe_router_topk * (start - 3) for count in before]
    return scores


def counts(model: Any) -> list[float]:
    """What the routers with score biases have counted, over all experts."""
    return [float(module.local_tokens_per_expert.sum()) for module in model.modules() if isinstance(module, TopKRouter)]


def scores_and_gradients(model: Any, scores: Tensor, groups: ProcessGroups) -> tuple[Tensor, dict[str, Tensor]]:
    weights = torch.randn(len(scores), generator=torch.Generator().manual_seed(2))
    (scores * weights).sum().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(parameter.grad, group=groups.tp)
        gradients[name] = parameter.grad
        parameter.grad = None
    return scores.detach(), gradients


def everything(model: Any) -> dict[str, Any]:
    """What detaching must leave as it was; but for ``attributes`` attaching, too."""
    sharded = model.sharded_state_dict()
    return {
        "attributes": [{key: id(value) for key, value in vars(module).items()} for module in model.modules()],
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "parameters": [(name, id(parameter)) for name, parameter in model.named_parameters()],
        "state": [(name, getattr(value, "shape", None)) for name, value in model.state_dict().items()],
        "sharded": [(name, value.key, getattr(value, "global_shape", None)) for name, value in sharded.items()],
    }


def recompute_attention(model: Any, asked: bool) -> None:
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.checkpoint_core_attention = asked


def before_and_after(names: list[str], tp: int) -> dict[str, Any]:
    """Of each model its scores and gradients apart, and packed once it is adopted."""
    groups = initialize_runtime(tp)
    # Megatron's router compiles what counts for score biases, which wants a GPU.
    torch.compiler.set_stance("force_eager")
    found: dict[str, Any] = {}
    pairs = make_tokens(tp)
    for name in names:
        model = build(KINDS[name], groups, RMSNorm if tp > 1 else None)
        first = scores_and_gradients(model, apart(model, pairs, tp), groups)
        kept = everything(model)
        for _ in range(2):
            attach_model(model, vocab_size=VOCAB, chunk_size=7)
            assert kept | {"attributes": None} == everything(model) | {"attributes": None}, name
            found[name] = first, scores_and_gradients(model, packed(model, pairs), groups)
            torch.testing.assert_close(apart(model, pairs, tp).detach(), first[0], rtol=0, atol=0)
            # What recomputation of attention asks for; the second time.
            recompute_attention(model, tp == 1)
            detach_model(model)
        recompute_attention(model, False)
        assert kept == everything(model), name
    shutdown_runtime()
    return found


@pytest.mark.dist
@pytest.mark.parametrize("tp", [1, 2])
def test_packed_rows_score_as_the_model_itself_does(tp: int) -> None:
    names = list(KINDS) if tp == 1 else ["rope, tied", "yarn", "learned positions", "sinks, windows in every second layer"]
    for found in run_distributed(before_and_after, tp, names, tp):
        for name, ((scores, gradients), (packed_scores, packed_gradients)) in found.items():
            torch.testing.assert_close(packed_scores, scores, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
            assert packed_gradients.keys() == gradients.keys()
            # A bias of keys that nothing turns has none but rounding.
            least = 1e-3 * max(gradient.norm() for gradient in gradients.values())
            for parameter, gradient in gradients.items():
                error = (packed_gradients[parameter] - gradient).norm() / gradient.norm().clamp(min=least)
                assert error < 1e-4, (name, parameter, float(error))


@pytest.mark.dist
def test_adapters_experts_copies_and_transformer_engine() -> None:
    run_distributed(in_one_world, 1)


def in_one_world() -> None:
    groups = initialize_runtime()
    adapters(groups)
    uncounted_tokens(groups)
    transformer_engine_core(groups)
    shutdown_runtime()


def transformer_engine_core(groups: ProcessGroups) -> None:
    """A stand-in for Transformer Engine's core attention is replaced as Megatron's is; it needs a GPU itself."""

    class TEDotProductAttention(DotProductAttention):
        """Of the real one's name and parameters, which are none but the sinks."""

    pairs, model = make_tokens(1), build(KINDS["sinks, windows in every second layer"], groups)
    for layer in model.decoder.layers:
        layer.self_attention.core_attention.__class__ = TEDotProductAttention
    first = apart(model, pairs, 1).detach()
    with pytest.raises(ConfigError, match="what TEDotProductAttention does with scores is not known"):
        attach_model(model, vocab_size=VOCAB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer_engine, "TEDotProductAttention", TEDotProductAttention, raising=False)
        patch.setattr(adopt, "transformer_engine_available", lambda: True)
        attach_model(model, vocab_size=VOCAB)
    torch.testing.assert_close(packed(model, pairs).detach(), first, rtol=1e-5, atol=1e-5)


def adapters(groups: ProcessGroups) -> None:
    """Of a model with LoRA the adapters alone get gradients, the same as apart; its copy is a model of its own."""
    pairs = make_tokens(1)
    model = build(Built(config={"add_bias_linear": False}), groups)
    add_adapters(model)
    kept = everything(model)
    first, gradients = scores_and_gradients(model, apart(model, pairs, 1), groups)
    assert gradients.keys() == {name for name, _ in model.named_parameters() if ".adapter." in name}
    attach_model(model, vocab_size=VOCAB, chunk_size=7)
    # Process groups are nothing that Python can copy.
    handed_over = {id(group): group for group in (groups.tp, groups.pp, groups.dp, groups.ep, groups.expert_tp, groups.world)}
    for module in model.modules():
        handed_over |= {id(value): value for value in vars(module).values() if isinstance(value, dist.ProcessGroup)}
        handed_over |= {id(value): value for name, value in vars(module).items() if name == "pg_collection"}
    copied = copy.deepcopy(model, handed_over)
    for one in (model, copied):
        scores, found = scores_and_gradients(one, packed(one, pairs), groups)
        torch.testing.assert_close(scores, first, rtol=1e-5, atol=1e-5)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (found[name] - gradient).norm() < 1e-4 * gradient.norm(), name
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    # Its own table, attention and head.
    assert packed(copied, pairs).allclose(torch.tensor(1 / VOCAB).log())
    torch.testing.assert_close(packed(model, pairs), first, rtol=1e-5, atol=1e-5)
    detach_model(copied)
    detach_model(model)
    assert kept == everything(model)
    build(Built(config={"add_bias_linear": False}), groups).load_state_dict(
        {name: value for name, value in model.state_dict().items() if ".adapter." not in name}
    )


def uncounted_tokens(groups: ProcessGroups) -> None:
    """Auxiliary losses that a model's owner asked for are those of the tokens that count, whatever else is in the row."""
    torch.compiler.set_stance("force_eager")
    experts = {
        name: value for name, value in KINDS["experts, score biases"].config.items() if "bias" not in name or "linear" in name
    }
    experts |= {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.1}
    found = []
    for further in (0, 5):
        model = build(Built(config=experts), groups).train()
        attach_model(model, vocab_size=VOCAB)
        tokens = torch.randint(VOCAB, (9 + further,), generator=torch.Generator().manual_seed(3))
        row = {
            "token_ids": tokens,
            "position_ids": torch.cat([torch.arange(9), torch.arange(further)]),
            "segments": torch.tensor([[0, 9, 0, 0], [9, further, 0, 0]][: 1 + bool(further)]),
            "source": torch.arange(4, 8),
            "target": tokens[5:9],
        }
        # The head's gradient is zero: what is left comes from the auxiliary losses alone.
        (0.0 * model(**row, uncounted=torch.arange(9 + further) >= 9).sum()).backward()
        found.append([layer.mlp.router.weight.grad for layer in model.decoder.layers])
    for alone, among_others in zip(*found, strict=True):
        assert alone.norm() > 0
        torch.testing.assert_close(among_others, alone, rtol=1e-5, atol=1e-7)


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


class LoRALinear(torch.nn.Module):
    """As Megatron-Bridge 0.6.2 wraps a layer (megatron/bridge/peft/lora_layers.py, adapter_wrapper.py), on one rank.

    Args:
        to_wrap: a linear layer of Megatron's.
        rank: of the adapter.
        dropout: before it.
    """

    def __init__(self, to_wrap: torch.nn.Module, rank: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.to_wrap = to_wrap
        rows, columns = to_wrap.weight.shape
        self.adapter = torch.nn.Sequential(
            torch.nn.Dropout(dropout), torch.nn.Linear(columns, rank, bias=False), torch.nn.Linear(rank, rows, bias=False)
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = self.to_wrap(x, *args, **kwargs)
        return output + self.adapter(x.contiguous()).reshape(output.shape), bias

    def state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        destination = {} if destination is None else destination
        self.to_wrap.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        self.adapter.state_dict(destination=destination, prefix=f"{prefix}adapter.", keep_vars=keep_vars)
        return destination

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        return self.to_wrap.sharded_state_dict(prefix, sharded_offsets, metadata)


def add_adapters(model: Any, dropout: float = 0.0) -> None:
    """LoRA on every linear layer of the decoder, all else frozen."""
    model.requires_grad_(False)
    for module in list(model.decoder.modules()):
        for name in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"):
            if name in module._modules:
                module._modules[name] = LoRALinear(module._modules[name], dropout=dropout)


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
    (change("__class__", ScaledLogits), "ScaledLogits.forward of tests.model.test_adopt is not"),
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
