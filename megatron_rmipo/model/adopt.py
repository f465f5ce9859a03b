"""A model that somebody else built with Megatron's own specs, made ready for :func:`megatron_rmipo.model.packed_model.score_row`.

Its parameters, their names and its ``sharded_state_dict`` stay as they are, and so does what its own ``forward`` gives: a core
attention attends within segments only where it is handed them as the mask, a rotary embedding looks up positions only where it
is handed them instead of a length, an output layer gives log-probs only where it is handed targets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn import Module

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.model.attention.packed import PackedAttention, choose_backend
from megatron_rmipo.model.attention.scores import ScoreRules
from megatron_rmipo.model.hybrid import HybridModel
from megatron_rmipo.model.layers.experts import PaddedRouter
from megatron_rmipo.model.lora.bridge import bridge_adapter_problems, is_recompute_hook, take_any_row
from megatron_rmipo.model.packed_model import Chunks, Replacement, ScoringOptions, chunks_of, enable_scoring, score_row, unwrapped
from megatron_rmipo.model.transformer_engine import transformer_engine_available

_MODELS = (GPTModel,) if HybridModel is None else (GPTModel, HybridModel)
# What a forward pass of these goes through beside their modules.
_MODEL_METHODS = ("forward", "_preprocess", "_postprocess", "_scale_logits", "shared_embedding_or_output_weight")

# Of problems: the layers of a model have the same as a rule.
_MOST_TOLD = 8


class PackedCore(Replacement):
    """The call of a core attention: segments as its mask make it attend within them.

    Args:
        core: the core attention.
        packed: what computes the same over packed rows. It is none of the model's modules, so that no name changes.
    """

    def __init__(self, core: Module, packed: PackedAttention) -> None:
        super().__init__(core)
        self.packed = packed

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        """As :class:`megatron_rmipo.model.attention.packed.PackedAttention` with segments, else as the core attention does."""
        is_packed = attention_mask is not None and attention_mask.dtype == torch.int64
        attend = self.packed if is_packed else self.behind
        return attend(query, key, value, attention_mask, *args, **kwargs)


class PositionAngles(Replacement):
    """The call of rotary embeddings: positions instead of a length give the angles of each token's own.

    Args:
        rotary: the rotary embeddings.
        length: positions that there are.
    """

    def __init__(self, rotary: Module, length: int) -> None:
        super().__init__(rotary)
        self.table = _angles(rotary, length)

    def __call__(self, positions: Any, *args: Any, **kwargs: Any) -> Any:
        """``[T, 1, 1, D]`` angles of int64 ``[T]`` positions; for a length what the rotary embeddings give."""
        if not isinstance(positions, Tensor):
            return self.behind(positions, *args, **kwargs)
        if self.table.device != positions.device:
            # The model was moved since.
            self.table = self.table.to(positions.device)
        return self.table[positions]


class UncountedTokens(Replacement):
    """What a router counts for its score biases, uncounted tokens left out; Megatron's own fails at them."""

    def __init__(self, router: TopKRouter) -> None:
        super().__init__(router, "_apply_expert_bias")
        self.router = router

    def __call__(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """As :class:`megatron_rmipo.model.layers.experts.PaddedRouter` does."""
        PaddedRouter._apply_expert_bias(self.router, routing_map, padding_mask)


class ZLoss(Replacement):
    """A router's z-loss, left out where no token counts: Megatron's is a mean, which over none is no number."""

    def __init__(self, router: TopKRouter) -> None:
        super().__init__(router, "apply_z_loss")
        self.router = router

    def __call__(self, logits: Tensor, padding_mask: Tensor | None = None) -> Any:
        """Logits ``[T, E]`` whose backward adds that of the loss, for tokens that count (``padding_mask [T]`` is false)."""
        if self.router.config.moe_z_loss_coeff is not None and padding_mask is not None and bool(padding_mask.all()):
            return logits
        return self.behind(logits, padding_mask=padding_mask)


class LoadBalancingLoss(Replacement):
    """A router's load-balancing loss, left out in the same case."""

    def __init__(self, router: TopKRouter) -> None:
        super().__init__(router, "attach_and_log_load_balancing_loss")

    def __call__(self, activation: Tensor, *args: Any, valid_token_count: Any = None, **kwargs: Any) -> Any:
        """The activation, whose backward adds that of the loss times this rank's tokens that count."""
        if valid_token_count is not None and int(valid_token_count) == 0:
            return activation
        return self.behind(activation, *args, valid_token_count=valid_token_count, **kwargs)


class PackedCall(Replacement):
    """The call of a model: given ``segments`` it is one of a packed row, else the model's own.

    Args:
        model: without wrappers.
        options: of its scoring.
    """

    def __init__(self, model: Any, options: ScoringOptions) -> None:
        super().__init__(model)
        self.model = model
        model.scoring_options = options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """:func:`megatron_rmipo.model.packed_model.score_row` where there are ``segments``."""
        if "segments" not in kwargs:
            return self.behind(*args, **kwargs)
        return score_row(self.model, options=self.model.scoring_options, **kwargs)

    def remove(self) -> None:
        """Give the model its own call back."""
        super().remove()
        del self.model.scoring_options


def attach_model(model: Chunks, *, vocab_size: int, chunk_size: int = 4096, attention_backend: str = "auto") -> None:
    """Let a call of a model, wrapped or not, take a packed row, too. No communication.

    A model that has adapters, ours or those of Megatron-Bridge, is scored with them as they are switched.

    The call is that of :class:`megatron_rmipo.model.policy.PolicyModel`, by keywords: ``model(token_ids=..., position_ids=...,
    segments=..., source=..., target=...)``. Any other call is the model's own. On the CPU and on a GPU, before wrapping or after.

    Args:
        model: this rank's part of a GPTModel or HybridModel, wrapped (DDP, mixed precision) or not; of an interleaved pipeline
            the list of its chunks.
        vocab_size: real vocabulary, without padding for tensor parallelism.
        chunk_size: vocabulary entries whose logits exist at a time.
        attention_backend: as of :func:`megatron_rmipo.model.build.build_policy`.

    Raises:
        ConfigError: what cannot be scored exactly, each with its module and the reason; or the model takes packed rows already.
            All chunks are then as they were.
    """
    own = [unwrapped(chunk) for chunk in chunks_of(model)]
    for inner in own:
        problems = list(_problems(inner, vocab_size))
        if problems:
            listed = "\n".join(f"  {problem}" for problem in problems[:_MOST_TOLD])
            if len(problems) > _MOST_TOLD:
                listed += f"\n  and {len(problems) - _MOST_TOLD} more"
            raise ConfigError(f"This {type(inner).__name__} cannot be scored over packed rows as it computes:\n{listed}")
    for inner in own:
        _attach(inner, ScoringOptions(vocab_size, chunk_size, longest=_longest(inner)), attention_backend)


def detach_model(model: Chunks) -> None:
    """Undo :func:`attach_model`: the model is as it was before.

    Args:
        model: as there.

    Raises:
        ConfigError: it is not attached.
    """
    own = [unwrapped(chunk) for chunk in chunks_of(model)]
    for inner in own:
        if not isinstance(vars(inner).get("forward"), PackedCall):
            raise ConfigError(f"this {type(inner).__name__} is not attached, so that there is nothing to undo.")
    for inner in own:
        for module in inner.modules():
            for replacement in [value for value in vars(module).values() if isinstance(value, Replacement)]:
                if not replacement.outlives_attach:
                    replacement.remove()


def _attach(model: Any, options: ScoringOptions, backend: str) -> None:
    for layer in model.decoder.layers:
        attention = layer.self_attention
        if isinstance(attention, SelfAttention) and not isinstance(attention.core_attention, PackedAttention):
            PackedCore(attention.core_attention, _packed_attention(attention, backend))
    rotary = getattr(model, "rotary_pos_emb", None)
    if rotary is not None:
        PositionAngles(rotary, model.max_sequence_length)
    for module in model.modules():
        if isinstance(module, TopKRouter) and not isinstance(module, PaddedRouter):
            UncountedTokens(module)
            ZLoss(module)
            LoadBalancingLoss(module)
    take_any_row(model)
    enable_scoring(model)
    PackedCall(model, options)


def _longest(model: Any) -> int | None:
    """Tokens of the longest sequence that the model has positions for."""
    return None if model.position_embedding_type == "none" else int(model.max_sequence_length)


def _packed_attention(attention: SelfAttention, backend: str) -> PackedAttention:
    """What computes the same over packed rows, with the core attention's own sinks, where it has them."""
    config, window = attention.config, _window(attention)
    sinks = attention.core_attention.softmax_offset if config.softmax_type == "learnable" else None
    return PackedAttention(
        config,
        attention.layer_number,
        backend=choose_backend(backend, config.kv_channels),
        # Megatron counts the tokens before; all of them are -1.
        rules=ScoreRules(window=None if window is None or window[0] < 0 else window[0] + 1, sinks=sinks is not None),
        softmax_scale=config.softmax_scale,
        sinks=sinks,
    )


def _window(attention: SelfAttention) -> tuple[int, int] | None:
    """How many tokens before and behind itself a token of this layer sees, where Megatron cuts them."""
    config = attention.config
    cut = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, attention.layer_number)
    return config.window_size if cut else None


@torch.no_grad()
def _angles(rotary: Module, length: int) -> Tensor:
    """fp32 ``[length, 1, 1, D]``: what rotary embeddings give for a row of so many tokens."""
    found = rotary(length)
    # Yarn's also give the factor of queries and keys, which the attention reads from its configuration.
    angles: Tensor = found[0] if isinstance(found, tuple) else found
    return angles


def _problems(model: Any, vocab_size: int) -> Iterator[str]:
    if not isinstance(model, _MODELS):
        yield f"it is none of {', '.join(kind.__name__ for kind in _MODELS)}, whose parts are known"
        return
    if isinstance(getattr(model, "scoring_options", None), ScoringOptions):
        attached = isinstance(vars(model).get("forward"), PackedCall)
        yield f"it takes packed rows already; {'to attach it otherwise, detach it first' if attached else 'leave attach out'}"
        return
    for method in _MODEL_METHODS:
        if foreign := _foreign(model, method):
            yield foreign
    if not 0 < vocab_size <= model.vocab_size:
        yield f"vocab_size {vocab_size}: the model has {model.vocab_size} tokens, padding among them"
    yield from scoring_problems(model.config)
    yield from _part_problems(model)
    yield from _dropout_problems(model)
    yield from bridge_adapter_problems(model)
    if foreign := _foreign(model.decoder):
        yield f"decoder: {foreign}"
    for number, layer in enumerate(model.decoder.layers):
        for problem in _layer_problems(layer):
            yield f"decoder.layers.{number}{problem}"


def _foreign(module: Any, method: str = "forward") -> str | None:
    """What a method is that is not Megatron's own: it may compute anything."""
    if method in vars(module) and not is_recompute_hook(vars(module)[method]):
        return f"{type(module).__name__}.{method} was replaced in this object, so that what it computes is not known"
    function = getattr(type(module), method, None)
    where = getattr(function, "__module__", "megatron.core")
    # Not all of megatron.*: Megatron-Bridge is there, too, and its classes compute what they like.
    if where.split(".")[:2] == ["megatron", "core"]:
        return None
    return f"{type(module).__name__}.{method} of {where} is not Megatron-Core's, so that what it computes is not known"


def scoring_problems(config: Any) -> Iterator[str]:
    """What of a model's TransformerConfig keeps it from being scored exactly, a line each with the reason."""
    if config.context_parallel_size > 1:
        yield f"context_parallel_size {config.context_parallel_size}: rows of models that others built stay whole on a rank; 1"
    if config.mtp_num_layers:
        yield f"mtp_num_layers {config.mtp_num_layers}: multi-token prediction has a loss of its own, which is not built"
    if config.multi_latent_attention:
        yield "multi_latent_attention turns keys by positions of its own, which packed rows would not reach"
    if config.softmax_type not in ("vanilla", "learnable"):
        yield f"softmax_type {config.softmax_type!r}: of sinks only learnable ones are built"
    if getattr(config, "use_mup", False):
        yield "use_mup scales logits, which log-probs over the vocabulary's chunks leave out"
    for name in ("moe_input_jitter_eps", "moe_expert_capacity_factor"):
        if getattr(config, name) is not None:
            yield f"{name} {getattr(config, name)} would make a token's experts depend on what else is in the batch, or on chance"
    balancing = config.moe_router_load_balancing_type
    for kind in ("sinkhorn", "quantile_balancing"):
        if kind in (balancing if isinstance(balancing, list) else [balancing]) and config.num_moe_experts:
            yield f"moe_router_load_balancing_type {kind} makes a token's experts depend on what else is in the batch"
    if config.num_moe_experts and getattr(config, "moe_router_force_load_balancing", False):
        yield "moe_router_force_load_balancing gives tokens to experts by chance"
    if config.tp_comm_overlap:
        yield "tp_comm_overlap fixes the length of rows, and packed ones differ in it"
    if config.cuda_graph_impl != "none":
        yield f"cuda_graph_impl {config.cuda_graph_impl!r} fixes the length of rows, and packed ones differ in it"


def _dropout_problems(model: Any) -> Iterator[str]:
    found = {name: getattr(model.config, name) for name in ("hidden_dropout", "attention_dropout")}
    if not any(found.values()):
        # Adapters bring their own, and a layer's spec may give it another than the configuration's.
        found = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
        for number, layer in enumerate(model.decoder.layers):
            found[f"decoder.layers.{number}.hidden_dropout"] = getattr(layer, "hidden_dropout", 0.0)
    for name, share in found.items():
        if share:
            yield f"{name}: dropout of {share} would make a loss depend on how the batch is cut; build the model with 0"


def _part_problems(model: Any) -> Iterator[str]:
    if model.pre_process and model.config.sequence_parallel and not model.embedding.scatter_to_sequence_parallel:
        yield "embedding: it leaves the row whole under sequence parallelism; build it with scatter_to_sequence_parallel"
    if model.post_process:
        head = model.output_layer
        if type(head) is not ColumnParallelLinear:
            yield f"output_layer: it is a {type(head).__name__}, and log-probs are built for Megatron's ColumnParallelLinear"
        elif head.bias is not None:
            yield "output_layer: it has a bias, which log-probs over the vocabulary's chunks leave out"
    rotary = getattr(model, "rotary_pos_emb", None)
    if rotary is None:
        return
    if model.position_embedding_type not in ("rope", "yarn"):
        yield f"rotary_pos_emb: positions of the kind {model.position_embedding_type!r} are not built; rope and yarn are"
    elif foreign := _foreign(rotary):
        yield f"rotary_pos_emb: {foreign}"
    elif _angles(rotary, 3).shape[:3] != (3, 1, 1):
        yield f"rotary_pos_emb: a {type(rotary).__name__} gives no table with a row of angles for each position"


def _layer_problems(layer: Module) -> Iterator[str]:
    if not isinstance(layer, TransformerLayer):
        yield (
            f": {type(layer).__name__} is no TransformerLayer; one that hands a state from token to token would have to hand "
            "that of a prompt to both of its responses"
        )
        return
    if foreign := _foreign(layer):
        yield f": {foreign}"
    if not isinstance(layer.cross_attention, IdentityOp):
        yield ".cross_attention: there is nothing that it could attend to"
    attention = layer.self_attention
    if isinstance(attention, IdentityOp):
        return
    if not isinstance(attention, SelfAttention):
        yield f".self_attention: {type(attention).__name__} is not built over packed rows; Megatron's SelfAttention is"
        return
    if foreign := _foreign(attention):
        yield f".self_attention: {foreign}"
    if attention.attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
        yield f".self_attention: its mask is {attention.attn_mask_type.name}, and a language model's is causal"
    core = attention.core_attention
    if not isinstance(core, PackedAttention) and type(core) not in _core_attentions():
        yield (
            f".self_attention.core_attention: what {type(core).__name__} does with scores is not known; Megatron's "
            f"{' and '.join(kind.__name__ for kind in _core_attentions())} are"
        )
    window = _window(attention)
    # Megatron's local attention cuts as it is told, Transformer Engine's by its causal mask besides.
    if window is not None and isinstance(core, DotProductAttention) and (window[0] < 0 or window[1] != 0):
        yield f".self_attention: Megatron's local attention with window_size {window} is not causal; (tokens before, 0) is built"


def _core_attentions() -> tuple[type, ...]:
    if not transformer_engine_available():
        return (DotProductAttention,)
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return (DotProductAttention, TEDotProductAttention)
