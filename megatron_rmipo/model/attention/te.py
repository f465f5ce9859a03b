"""Attention of a packed row by Transformer Engine's kernels: each segment a sequence of its own, in THD form.

A segment's queries attend to its prefix and to itself. The kernels know no prefix, but sequences with more keys than queries and
a causal mask aligned at their ends (bottom right): the last query sees all keys, the first one the prefix and itself. So the keys
and values of a prefix are repeated in front of those of each segment that reads it, by an ``index_select`` that sums their
gradients.

The queries of a context-parallel rank are runs of segments, whose keys are those of the prefix and of the segment up to the run's
end.

Shape letters: L tokens of this rank, T of the row, K keys (counted for each run that reads them), R runs, A query heads, G
key/value heads, D head size, E size of a value; heads are those of this rank.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from megatron_rmipo.model.attention.scores import ScoreRules
from megatron_rmipo.runtime.transfers import to_device

_Integers = npt.NDArray[np.int64]
# As in flex.
_LAYOUTS_KEPT = 32


class VarlenLayout(NamedTuple):
    """The runs of a rank as sequences.

    Attributes:
        cu_seqlens_q, cu_seqlens_kv: int32 ``[R + 1]``, where queries and keys of each sequence begin, and those of the last end.
        key_index: int64 ``[K]``, the token that each key is; None where the keys are the row's tokens as they stand.
        max_seqlen_q, max_seqlen_kv: of the longest sequence.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_kv: Tensor
    key_index: Tensor | None
    max_seqlen_q: int
    max_seqlen_kv: int


def varlen_layout(runs: _Integers, num_tokens: int, window: int | None = None) -> VarlenLayout:
    """The layout, on the CPU, of ``runs [R, 5]`` of a row of ``num_tokens``, in the order of the rank's tokens without a gap.

    Tokens of a prefix, or of the segment before the run, that lie outside of the window of the run's first token are left out.
    """
    start, length, own_start, prefix_start, prefix_length = runs.T
    own_before = start - own_start
    if window is not None:
        own_before, before = np.minimum(own_before, window - 1), own_before
        in_window = np.clip(window - 1 - before, 0, prefix_length)
        prefix_start, prefix_length = prefix_start + prefix_length - in_window, in_window
    own_length = own_before + length
    kv_length = prefix_length + own_length
    # Prefix, segment, prefix, segment ...: runs of consecutive tokens.
    starts, lengths = np.stack([prefix_start, start - own_before], 1).ravel(), np.stack([prefix_length, own_length], 1).ravel()
    before = np.cumsum(lengths) - lengths
    key_index = np.repeat(starts - before, lengths) + np.arange(lengths.sum())
    as_they_stand = key_index.size == num_tokens and (key_index == np.arange(num_tokens)).all()
    keys = None if as_they_stand else torch.from_numpy(key_index)
    return VarlenLayout(_offsets(length), _offsets(kv_length), keys, int(length.max()), int(kv_length.max()))


def _offsets(lengths: _Integers) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def build_kernel(
    config: TransformerConfig, layer_number: int, softmax_scale: float, rules: ScoreRules, num_shares: int = 1
) -> torch.nn.Module:
    """Transformer Engine's attention. Megatron-Core's wrapper of it does not know the mask we need.

    It has no parameters, but where the rules have sinks their scores, ``softmax_offset [A]``.

    Args:
        config: of the layers.
        layer_number: as Megatron passes it.
        softmax_scale: factor of the scores.
        rules: without soft cap, which the kernels do not know.
        num_shares: ranks that each have a part of the heads of a tensor-parallel rank.
    """
    from transformer_engine.pytorch import DotProductAttention  # type: ignore[import-not-found]

    assert rules.softcap is None, "the flags are checked before"
    kernel: torch.nn.Module = DotProductAttention(
        num_attention_heads=config.num_attention_heads,
        kv_channels=_head_sizes(config),
        # Above their number Megatron-Core gives each rank one, which others have, too.
        num_gqa_groups=max(config.num_query_groups, config.tensor_model_parallel_size),
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal_bottom_right",
        tp_size=config.tensor_model_parallel_size * num_shares,
        layer_number=layer_number,
        # Sequences may have more keys than queries.
        attention_type="cross",
        softmax_scale=softmax_scale,
        # Older releases do not know the argument.
        **({"softmax_type": "learnable"} if rules.sinks else {}),
    )
    return kernel


def _head_sizes(config: TransformerConfig) -> int | tuple[int, int] | None:
    """The size of a head; in latent attention that of a query and key, and that of a value."""
    if isinstance(config, MLATransformerConfig):
        return (config.qk_head_dim + config.qk_pos_emb_head_dim, config.v_head_dim)
    size: int | None = config.kv_channels
    return size


def attend_varlen(
    kernel: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, runs: _Integers, window: int | None = None
) -> Tensor:
    """Attention of a rank's tokens to those of the row that they see. Nothing is read back from the device.

    Args:
        kernel: from :func:`build_kernel`.
        query: ``[L, A, D]``.
        key: ``[T, G, D]``, in the order of the row.
        value: ``[T, G, E]``.
        runs: int64 ``[R, 5]`` that the queries are, see :func:`megatron_rmipo.model.attention.deal.runs_of`.
        window: how many tokens one sees, by position; None for all before it.

    Returns:
        ``[L, A, E]``.
    """
    layout = _layout_on_device(runs.tobytes(), key.shape[0], window, query.device)
    if layout.key_index is not None:
        key, value = key.index_select(0, layout.key_index), value.index_select(0, layout.key_index)
    output: Tensor = kernel(
        query,
        key,
        value,
        qkv_format="thd",
        attn_mask_type="padding_causal_bottom_right",
        # Aligned as the mask is, at the last query and the last key.
        window_size=None if window is None else (window - 1, 0),
        cu_seqlens_q=layout.cu_seqlens_q,
        cu_seqlens_kv=layout.cu_seqlens_kv,
        # Otherwise read from the device, which the host would have to wait for; so would be whether sequences are padded.
        max_seqlen_q=layout.max_seqlen_q,
        max_seqlen_kv=layout.max_seqlen_kv,
        pad_between_seqs=False,
    )
    return output.view(*query.shape[:2], value.shape[2])


@functools.lru_cache(maxsize=_LAYOUTS_KEPT)
def _layout_on_device(runs_bytes: bytes, num_tokens: int, window: int | None, device: torch.device) -> VarlenLayout:
    layout = varlen_layout(np.frombuffer(runs_bytes, dtype=np.int64).reshape(-1, 5), num_tokens, window)
    return layout._replace(
        cu_seqlens_q=to_device(layout.cu_seqlens_q, device),
        cu_seqlens_kv=to_device(layout.cu_seqlens_kv, device),
        key_index=None if layout.key_index is None else to_device(layout.key_index, device),
    )
