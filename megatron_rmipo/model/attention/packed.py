"""Attention over a packed row: no padding, the prompt of a pair shared by its responses.

Shape letters: T packed tokens, of a context-parallel rank those that it holds, S segments, A query heads and G key/value heads of
this rank, D head size, E size of a value, which is D but in latent attention.

A row is described by ``segments``, int64 ``[S, 4]`` on the CPU: ``(start, length, prefix_start, prefix_length)``. The tokens
``start .. start + length`` attend causally to their own segment and to the whole of the prefix, which lies in an earlier segment.
It travels through the decoder as the ``attention_mask`` argument: activation recomputation saves tensors only, and a small CPU
tensor can be read without waiting for the GPU. Ranks that share a row all have the segments of the whole row, from which each
knows what it holds (:mod:`megatron_rmipo.model.attention.deal`).
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
from torch.distributed import ProcessGroup

from megatron_rmipo.families.architecture import LayerKind, ModelArchitecture
from megatron_rmipo.model.attention.context_parallel import Attend, Part, attend_gathered, heads_of_row, tokens_of_rank
from megatron_rmipo.model.attention.deal import RowShare, row_share, whole_runs
from megatron_rmipo.model.attention.flex import BLOCK_TOKENS, LEAST_HEAD_SIZE, attend_flex
from megatron_rmipo.model.attention.scores import PLAIN, ScoreRules
from megatron_rmipo.model.attention.sdpa import Piece, attend_piece, attend_runs, pieces_of
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
        pg_collection: Megatron's, which passes it; sinks are cut over its ``tp``, rows over its ``cp``.
        cp_comm_type: how ranks that share a row attend to each other's tokens; Megatron passes the configuration's.
            ``all_gather``: keys and values of all are gathered. ``a2a``: each rank has all tokens for a part of its heads.
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
        cp_comm_type: str | None = None,
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
        cp_group = getattr(pg_collection, "cp", None)
        self.cp_group: ProcessGroup | None = None if cp_group is None or cp_group.size() == 1 else cp_group
        self.exchanges_heads = self.cp_group is not None and cp_comm_type == "a2a"
        assert not (backend == "te" and rules.sinks and self.cp_group), "the flags are checked before"
        num_shares = self.cp_group.size() if self.cp_group is not None and self.exchanges_heads else 1
        self.kernel = build_kernel(config, layer_number, self.softmax_scale, rules, num_shares) if backend == "te" else None
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
        if self.cp_group is None:
            context = self._attend(query, key, value, whole_runs(attention_mask.numpy()), self.softmax_offset)
        else:
            share = row_share(attention_mask, self.cp_group, query.device)
            if self.exchanges_heads:
                context = self._attend_by_heads(query, key, value, attention_mask, share, self.cp_group)
            else:
                context = attend_gathered(query, key, value, self.softmax_offset, self._parts(share), share, self.cp_group)
        return context.flatten(1)[:, None]

    @property
    def computes_anew(self) -> bool:
        """Whether a backward pass computes the scores anew by itself, so that recomputation around it would save nothing."""
        return self.cp_group is not None and not self.exchanges_heads

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, runs: Any, sinks: Tensor | None) -> Tensor:
        if self.kernel is not None:
            return attend_varlen(self.kernel, query, key, value, runs, self.rules.window)
        attend = attend_flex if self.backend == "flex" else attend_runs
        return attend(query, key, value, runs, self.softmax_scale, self.rules, sinks)

    def _attend_by_heads(
        self, query: Tensor, key: Tensor, value: Tensor, segments: Tensor, share: RowShare, group: ProcessGroup
    ) -> Tensor:
        """This rank's tokens, after each rank of the group has computed all tokens for its part of the heads."""
        query, key, value = (heads_of_row(tensor, share, group) for tensor in (query, key, value))
        sinks = None if self.softmax_offset is None else self.softmax_offset.chunk(group.size())[group.rank()]
        return tokens_of_rank(self._attend(query, key, value, whole_runs(segments.numpy()), sinks), share, group)

    def _parts(self, share: RowShare) -> list[Part]:
        """What is computed at a time of this rank's queries against the keys of the row."""
        if self.backend != "sdpa":

            def attend(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
                return self._attend(query, key, value, share.runs, sinks)

            return [(slice(None), attend)]
        by_hand = self.rules.softcap is not None or self.rules.sinks
        return [(piece.queries, self._attend_piece(piece)) for piece in pieces_of(share.runs, self.rules.window, by_hand=by_hand)]

    def _attend_piece(self, piece: Piece) -> Attend:
        def attend(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Tensor:
            return attend_piece(query, key, value, piece, self.softmax_scale, self.rules, sinks)

        return attend

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
