"""What a model is, independent of who wrote its checkpoint."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Every frequency is ``factor`` times slower."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Low frequencies are slowed down, high ones kept, the band between is blended (Llama 3.1 and 3.2).

    Attributes:
        factor: by how much low frequencies are slowed down.
        low_freq_factor, high_freq_factor: how often a frequency turns within the original context at either end of the band.
        original_max_position_embeddings: context length before scaling, in tokens.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """Low frequencies are slowed down, high ones kept, and between them the channels go linearly from one to the other.

    Source: YaRN, arXiv 2309.00071.

    Attributes:
        factor: by how much low frequencies are slowed down.
        original_max_position_embeddings: context length before scaling, in tokens.
        beta_fast, beta_slow: how often a frequency turns within the original context at either end of the ramp.
        truncate: the ramp begins and ends at whole channels.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class LongRopeScaling:
    """Each frequency is slowed down by a factor of its own (LongRoPE, arXiv 2402.13753).

    Attributes:
        short_factors: those for sequences within the original context, one a pair of channels.
    """

    short_factors: tuple[float, ...]


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclasses.dataclass(frozen=True)
class Rope:
    """One kind of rotary embeddings of a model.

    Attributes:
        base: theta; channel pair i of D turns by ``base ** (-2 i / D)`` a position.
        scaling: how its frequencies are stretched over a longer context, or None.
        attention_factor: what turned queries, and turned keys, are multiplied by.
        longest_sequence: in tokens: a longer one is computed in another way, all of it; None where there is no such length.
    """

    base: float
    scaling: RopeScaling | None = None
    attention_factor: float = 1.0
    longest_sequence: int | None = None


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What the attention of one layer does, where layers of a model differ.

    Attributes:
        window: how many tokens, itself among them, a position sees, or None for all before it.
        rope: which of the model's ``ropes`` turns its queries and keys, or None for none of them.
    """

    window: int | None = None
    rope: int | None = 0


@dataclasses.dataclass(frozen=True)
class LatentAttention:
    """Attention whose queries, and whose keys and values, are made from narrow latents (DeepSeek's multi-head latent attention).

    Attributes:
        q_lora_rank: channels of the latent of queries; None where they are made from the hidden states.
        kv_lora_rank: channels of the latent of keys and values.
        qk_nope_head_dim: channels of a query and key of each head that rotary embeddings do not turn.
        qk_rope_head_dim: those they do, of a key the same for all heads.
        v_head_dim: channels of a value of each head.
        norm_epsilon: of the norms of the latents.
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    norm_epsilon: float = 1e-6

    @property
    def key_value_down_size(self) -> int:
        """Channels of the latent of keys and values, and of the turned key beside it."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclasses.dataclass(frozen=True)
class Experts:
    """The mixture of experts that stands in the place of the MLP.

    Attributes:
        num_experts: of a layer.
        per_token: how many of them a token goes through.
        ffn_hidden_size: channels between the matrices of one.
        dense_layers: layers (counted from 0) that have an ordinary MLP.
        shared_ffn_hidden_size: channels of the experts that every token goes through, together; 0 for none.
        shared_gate: what those give is weighted by the sigmoid of a number that each token makes.
        score_function: what makes scores of the router's logits, ``softmax`` or ``sigmoid``.
        normalized: the scores of a token's experts are made to sum to one.
        score_bias: each expert has a number that is added to its score where experts are chosen, and only there; it is no
            weight that is learned by gradients.
        router_bias: the router's logits have a bias.
        bias: an expert's gate, up and down have biases.
        num_groups: groups of experts, of which a token may use ``groups_per_token``; None without groups.
        scaling: factor of the scores that experts' outputs are weighted by.
        aux_loss_coeff: of the load-balancing loss in the model's own training; preference training leaves it out by default.
    """

    num_experts: int
    per_token: int
    ffn_hidden_size: int
    dense_layers: frozenset[int] = frozenset()
    shared_ffn_hidden_size: int = 0
    shared_gate: bool = False
    score_function: str = "softmax"
    normalized: bool = True
    score_bias: bool = False
    router_bias: bool = False
    bias: bool = False
    num_groups: int | None = None
    groups_per_token: int | None = None
    scaling: float = 1.0
    aux_loss_coeff: float = 0.0


@dataclasses.dataclass(frozen=True)
class ModelArchitecture:
    """A decoder-only transformer: RMSNorm, rotary embeddings, gated MLPs or experts, grouped-query or latent attention.

    Attributes:
        family: the mapping family that reads and writes its checkpoints (``llama``, ``mistral``).
        ffn_hidden_size: channels between the matrices of an MLP.
        kv_channels: size of one attention head, of its query and key in latent attention.
        vocab_size: real vocabulary, without padding for tensor parallelism.
        max_position_embeddings: the longest context, in tokens.
        ropes: its rotary embeddings, one unless its layers differ.
        tied_embeddings: the output layer is the word embedding.
        dtype: dtype its checkpoint is stored in (``bfloat16``, ``float16``, ``float32``).
        layer_kinds: what the attention of each layer does; empty where all see everything through the first rope.
        rotary_channels: how many channels of a head rotary embeddings turn, the first ones; None for all.
        rotary_interleaved: pairs of turned channels are neighbours, not half of them apart.
        qkv_bias: queries, keys and values have biases.
        attention_output_bias: the attention's output projection has one.
        mlp_bias: gate, up and down have biases.
        qk_norm: the queries and keys of each head are normed, all heads of a layer with the same two weights.
        qk_norm_whole: they are normed over all heads together, each channel with a weight of its own.
        attention_scale: factor of the scores; None for ``1 / sqrt(kv_channels)``.
        attention_softcap: scores s become ``cap * tanh(s / cap)``; None leaves them.
        attention_sinks: each head has a learned score that takes its part of the softmax and gives nothing.
        zero_centered_norm: norms multiply by one plus their weight.
        pre_norm: the input of attention and MLP is normed.
        post_norm: their output is, before it is added to the residual stream.
        activation: of the gate, ``silu`` or ``gelu_tanh``; or ``clamped_swiglu``: of gate g, at most ``activation_limit``, and up
            u, at most that far from zero, the MLP makes ``(u + 1) * g * sigmoid(1.702 g)``.
        activation_limit: that of ``clamped_swiglu``; None for other activations.
        embedding_multiplier: of the embedded tokens.
        embedding_multiplier_rounded: it is rounded to the dtype of the hidden states first.
        residual_multiplier: of what attention and MLP add to the residual stream.
        logit_multiplier: of the logits.
        logit_softcap: logits z become ``cap * tanh(z / cap)``; None leaves them.
        experts: its mixture of experts; None in a dense model.
        latent: its latent attention; None where queries, keys and values are made from the hidden states.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    ropes: tuple[Rope, ...]
    layernorm_epsilon: float
    tied_embeddings: bool = False
    dtype: str = "float32"
    layer_kinds: tuple[LayerKind, ...] = ()
    rotary_channels: int | None = None
    rotary_interleaved: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    attention_sinks: bool = False
    zero_centered_norm: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    activation: str = "silu"
    activation_limit: float | None = None
    embedding_multiplier: float = 1.0
    embedding_multiplier_rounded: bool = False
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None
    experts: Experts | None = None
    latent: LatentAttention | None = None

    @property
    def expert_layers(self) -> frozenset[int]:
        """Layers (counted from 0) that have experts."""
        return frozenset(range(self.num_layers)) - self.experts.dense_layers if self.experts else frozenset()

    @property
    def dense_layers(self) -> frozenset[int]:
        """Layers (counted from 0) that have an ordinary MLP."""
        return frozenset(range(self.num_layers)) - self.expert_layers

    @property
    def shared_expert_layers(self) -> frozenset[int]:
        """Layers (counted from 0) that have experts, and some that every token goes through."""
        return self.expert_layers if self.experts and self.experts.shared_ffn_hidden_size else frozenset()

    @property
    def score_bias_layers(self) -> frozenset[int]:
        """Layers (counted from 0) whose experts have numbers that are added to their scores where they are chosen."""
        return self.expert_layers if self.experts and self.experts.score_bias else frozenset()

    @property
    def router_bias_layers(self) -> frozenset[int]:
        """Layers (counted from 0) whose router's logits have a bias."""
        return self.expert_layers if self.experts and self.experts.router_bias else frozenset()

    @property
    def expert_bias_layers(self) -> frozenset[int]:
        """Layers (counted from 0) whose experts have biases."""
        return self.expert_layers if self.experts and self.experts.bias else frozenset()

    @property
    def has_mixed_layers(self) -> bool:
        """Whether some layers have experts and others an ordinary MLP."""
        return bool(self.expert_layers and self.dense_layers)

    @property
    def mlp_widths(self) -> tuple[int, ...]:
        """Channels between the matrices of MLPs that every token of a layer goes through: ordinary ones, shared experts."""
        dense = (self.ffn_hidden_size,) if self.dense_layers else ()
        shared = (self.experts.shared_ffn_hidden_size,) if self.experts and self.experts.shared_ffn_hidden_size else ()
        return dense + shared

    @property
    def query_size(self) -> int:
        """Channels of all query heads."""
        return self.num_attention_heads * self.kv_channels

    @property
    def key_size(self) -> int:
        """Channels of all key heads, and but in latent attention of all value heads."""
        return self.num_query_groups * self.kv_channels

    @property
    def turned_channels(self) -> int:
        """Channels of a head that rotary embeddings turn."""
        return self.kv_channels if self.rotary_channels is None else self.rotary_channels

    @property
    def longest_sequence(self) -> int:
        """In tokens, that the model takes and whose rotary embeddings are those of its ``ropes``."""
        return min([self.max_position_embeddings, *(rope.longest_sequence for rope in self.ropes if rope.longest_sequence)])

    @property
    def length_limit(self) -> str:
        """What bounds the length of sequences, in words of the config."""
        if self.longest_sequence == self.max_position_embeddings:
            return f"max_position_embeddings {self.max_position_embeddings}"
        return f"original context of {self.longest_sequence} tokens, beyond which its rotary embeddings depend on the length"

    @property
    def context_size(self) -> int:
        """Channels of the attention's output, before it is projected."""
        return self.num_attention_heads * (self.latent.v_head_dim if self.latent else self.kv_channels)

    @property
    def least_head_size(self) -> int:
        """Channels of a head's query and key, or of its value, whichever are fewer."""
        return min(self.kv_channels, self.latent.v_head_dim) if self.latent else self.kv_channels

    @property
    def key_value_up_size(self) -> int:
        """Channels made of the latent of keys and values: of all keys those that are not turned, and of all values."""
        assert self.latent is not None
        return self.num_attention_heads * (self.latent.qk_nope_head_dim + self.latent.v_head_dim)

    @property
    def without_latents(self) -> bool:
        """Whether queries, keys and values are made from the hidden states, all of them."""
        return self.latent is None

    @property
    def query_latent(self) -> bool:
        """Whether queries are made from a latent."""
        return self.latent is not None and self.latent.q_lora_rank is not None

    @property
    def query_without_latent(self) -> bool:
        """Whether the queries of latent attention are made from the hidden states."""
        return self.latent is not None and self.latent.q_lora_rank is None

    def kind_of(self, layer: int) -> LayerKind:
        """What the attention of ``layer`` (counted from 0) does."""
        return self.layer_kinds[layer] if self.layer_kinds else LayerKind()

    def has(self, trait: str | None, layer: int | None = None) -> bool:
        """Whether the model, or one of its layers, has a trait: the name of a field, or of a property that lists layers.

        Args:
            trait: its name; all have None.
            layer: counted from 0, for traits of some layers only.
        """
        value = True if trait is None else getattr(self, trait)
        return layer in value if isinstance(value, frozenset) else bool(value)


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_model_parallel_size: int) -> int:
    """Vocabulary size rounded up so that every tensor-parallel rank holds an equal share (Megatron's rule)."""
    multiple = divisible_by * tensor_model_parallel_size
    return (vocab_size + multiple - 1) // multiple * multiple
