"""What a model is, independent of who wrote its checkpoint."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """The ``llama3`` frequency scaling of rotary embeddings (Llama 3.1 and 3.2).

    Attributes:
        factor: by how much low frequencies are slowed down.
        low_freq_factor, high_freq_factor: the band between them is interpolated.
        original_max_position_embeddings: context length before scaling, in tokens.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelArchitecture:
    """A decoder-only transformer of the Llama kind: RMSNorm, RoPE, SwiGLU, grouped-query attention.

    Attributes:
        family: the mapping family that reads and writes its checkpoints (``llama``, ``mistral``).
        vocab_size: real vocabulary, without padding for tensor parallelism.
        kv_channels: size of one attention head.
        sliding_window: tokens a position can look back, or None for all.
        tied_embeddings: the output layer is the word embedding.
        dtype: dtype its checkpoint is stored in (``bfloat16``, ``float16``, ``float32``).
        qkv_bias: queries, keys and values have biases.
        attention_output_bias: the attention's output projection has one.
        mlp_bias: gate, up and down have biases.
        qk_norm: the queries and keys of each head are normed, all heads of a layer with the same two weights.
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
    rotary_base: float
    layernorm_epsilon: float
    tied_embeddings: bool = False
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    dtype: str = "float32"
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def query_size(self) -> int:
        """Channels of all query heads."""
        return self.num_attention_heads * self.kv_channels

    @property
    def key_size(self) -> int:
        """Channels of all key heads, and of all value heads."""
        return self.num_query_groups * self.kv_channels

    @property
    def cut_layer_parameters(self) -> int:
        """Numbers in a layer's weights that tensor parallelism cuts."""
        matrices = self.hidden_size * (2 * self.query_size + 2 * self.key_size + 3 * self.ffn_hidden_size)
        biases = self.qkv_bias * (self.query_size + 2 * self.key_size) + self.mlp_bias * 2 * self.ffn_hidden_size
        return matrices + biases

    @property
    def whole_layer_parameters(self) -> int:
        """Numbers in a layer's weights that every tensor-parallel rank holds: norms, and biases that are added after a sum."""
        return self.hidden_size * (2 + self.attention_output_bias + self.mlp_bias) + 2 * self.qk_norm * self.kv_channels

    @property
    def num_parameters(self) -> int:
        """Numbers in its weights, without padding of the vocabulary."""
        layer = self.cut_layer_parameters + self.whole_layer_parameters
        tables = 1 if self.tied_embeddings else 2
        return self.num_layers * layer + self.hidden_size * (tables * self.vocab_size + 1)


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_model_parallel_size: int) -> int:
    """Vocabulary size rounded up so that every tensor-parallel rank holds an equal share (Megatron's rule)."""
    multiple = divisible_by * tensor_model_parallel_size
    return (vocab_size + multiple - 1) // multiple * multiple
