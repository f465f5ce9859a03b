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
    """A decoder-only transformer of the Llama kind: RMSNorm, RoPE, SwiGLU, grouped-query attention, no biases.

    Attributes:
        family: the mapping family that reads and writes its checkpoints (``llama``, ``mistral``).
        vocab_size: real vocabulary, without padding for tensor parallelism.
        kv_channels: size of one attention head.
        sliding_window: tokens a position can look back, or None for all.
        tied_embeddings: the output layer is the word embedding.
        dtype: dtype its checkpoint is stored in (``bfloat16``, ``float16``, ``float32``).
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

    @property
    def num_parameters(self) -> int:
        """Numbers in its weights, without padding of the vocabulary."""
        queries, keys = self.num_attention_heads * self.kv_channels, self.num_query_groups * self.kv_channels
        layer = self.hidden_size * (2 * queries + 2 * keys + 3 * self.ffn_hidden_size + 2)
        tables = 1 if self.tied_embeddings else 2
        return self.num_layers * layer + self.hidden_size * (tables * self.vocab_size + 1)


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_model_parallel_size: int) -> int:
    """Vocabulary size rounded up so that every tensor-parallel rank holds an equal share (Megatron's rule)."""
    multiple = divisible_by * tensor_model_parallel_size
    return (vocab_size + multiple - 1) // multiple * multiple
