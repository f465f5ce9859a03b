"""Attention over a packed row: no padding, the prompt of a pair shared by its responses.

Shape letters: T packed tokens, S segments, A query heads of this rank, G key/value heads of this rank, D head size, E size of a
value, which is D but in latent attention.

A row is described by ``segments``, int64 ``[S, 4]`` on the CPU: ``(start, length, prefix_start, prefix_length)``. The tokens
``start .. start + length`` attend causally to their own segment and to the whole of the prefix, which lies in an earlier segment.
It travels through the decoder as the ``attention_mask`` argument: activation recomputation saves tensors only, and a small CPU
tensor can be read without waiting for the GPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_rmipo.families.architecture import LayerKind, ModelArchitecture
from megatron_rmipo.model.attention.flex import BLOCK_TOKENS, LEAST_HEAD_SIZE, attend_flex
from megatron_rmipo.model.attention.scores import PLAIN, ScoreRules
from megatron_rmipo.model.attention.sdpa import attend_segments
from megatron_rmipo.model.attention.te import attend_varlen, build_kernel
from megatron_rmipo.runtime.groups import current_device

# Backend -> rows that are a multiple of this long need no padded copies inside the attention.
BACKENDS = {"sdpa": 1, "flex": BLOCK_TOKENS, "te": 1}


def choose_backend(name: str, head_size: int) -> str:
    """``auto`` made out: ``flex`` with CUDA and heads that it takes, ``sdpa`` elsewhere; any other backend is itself."""
    if name == "auto":
        name = "flex" if torch.cuda.is_available() and head_size >= LEAST_HEAD_SIZE else "sdpa"
    assert name in BACKENDS, name
    return name


def core_attention_of(arch: ModelArchitecture, kind: LayerKind, backend: str) -> ModuleSpec:
    """The ``core_attention`` of the layers of one kind, for Megatron's layer specs."""
    rules = ScoreRules(window=kind.window, softcap=arch.attention_softcap, sinks=arch.attention_sinks)
    return ModuleSpec(module=PackedAttention, params={"backend": backend, "rules": rules})


class PackedAttention(torch.nn.Module):
    """A ``core_attention`` of Megatron's layer specs for packed rows.

    It holds no parameters, but where the rules have sinks their scores, ``softmax_offset [A]``, by Megatron's name for them.

    Args:
        config: head sizes and counts, ``attention_dropout``, ``params_dtype`` and ``init_method`` are read.
        layer_number: Megatron passes it.
        pg_collection: Megatron's, which passes it; sinks are cut over its ``tp``.
        backend: ``sdpa``: scaled_dot_product_attention, segment by segment; runs anywhere. ``flex``: FlexAttention with one
            block mask a pack, shared by all layers; trains on GPU only (it has no backward on CPU). ``te``: Transformer Engine,
            each segment a sequence, the keys of a shared prompt repeated for it; needs a GPU.
        rules: what happens to the scores.
        softmax_scale: where ``config.softmax_scale`` is None; default ``1 / sqrt(D)``.
        sinks: the scores ``[A]`` of rules that have them, where another module made them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *args: Any,
        backend: str = "sdpa",
        rules: ScoreRules = PLAIN,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        sinks: torch.nn.Parameter | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        assert backend in BACKENDS, backend
        assert config.attention_dropout == 0.0, "dropout would make the loss depend on how the batch is cut"
        self.backend = backend
        self.rules = rules
        self.pg_collection = pg_collection
        # Latent attention hands over one of its own, whatever the configuration says.
        scales = (config.softmax_scale, softmax_scale, 1.0 / math.sqrt(config.kv_channels or 1))
        self.softmax_scale = next(scale for scale in scales if scale is not None)
        self.kernel = build_kernel(config, layer_number, self.softmax_scale, rules) if backend == "te" else None
        self.softmax_offset = self._make_sinks(config) if rules.sinks and sinks is None else sinks
        if self.kernel is not None and self.softmax_offset is not None:
            # The kernel reads its own; it is the same parameter here, so that all backends have it by one name.
            self.kernel.softmax_offset = self.softmax_offset

    def _make_sinks(self, config: TransformerConfig) -> torch.nn.Parameter:
        if self.kernel is not None:
            sinks = self.kernel.softmax_offset
            assert isinstance(sinks, torch.nn.Parameter)
        else:
            device = "cpu" if config.use_cpu_initialization else current_device()
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            sinks = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype, device=device))
        if config.perform_initialization:
            with torch.no_grad():
                config.init_method(sinks)
        set_tensor_model_parallel_attributes(sinks, is_parallel=True, dim=0, stride=1)
        return sinks

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        attn_mask_type: Any = None,
        attention_bias: Any = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend within the segments.

        Args:
            query: ``[T, 1, A, D]``.
            key: ``[T, 1, G, D]``.
            value: ``[T, 1, G, E]``.
            attention_mask: the ``segments`` of the row.
            attn_mask_type, attention_bias, packed_seq_params: Megatron passes them; segments say it all.

        Returns:
            ``[T, 1, A * E]``.
        """
        # [T, 1, heads, D] -> [T, heads, D]
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if self.kernel is not None:
            context = attend_varlen(self.kernel, query, key, value, attention_mask, self.rules.window)
        else:
            attend = attend_flex if self.backend == "flex" else attend_segments
            context = attend(query, key, value, attention_mask, self.softmax_scale, self.rules, self.softmax_offset)
        return context.flatten(1)[:, None]

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The sinks, where there are any; nothing else, whatever the backend: a checkpoint of one is a checkpoint of all."""
        if self.softmax_offset is None:
            return {}
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {"softmax_offset": self.softmax_offset},
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.pg_collection.tp,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
        return sharded
