"""How the tensors of a Hugging Face checkpoint and of a Megatron model correspond, by the rules of the model's family.

A Megatron tensor is cut along its rows into *segments*, each a run of rows of one Hugging Face tensor; that one description
serves every direction and every layout: a tensor-parallel slice, a streamed piece, merging and un-merging.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Layout, Place, Rule
from megatron_rmipo.families.registry import FAMILIES
from megatron_rmipo.families.tensors import source_shapes, tensors_of

# A tensor by its Megatron name and where it stands.
TensorId = tuple[str, Place]


@dataclasses.dataclass(frozen=True)
class Segment:
    """Rows of source number ``source`` from ``start`` on, every ``step``-th, at this place of the Megatron tensor."""

    source: int
    start: int
    rows: int
    step: int = 1

    @property
    def places(self) -> slice:
        """The rows of the source."""
        return slice(self.start, self.start + self.rows * self.step, self.step)


# The local layer spec names the norms apart; in distributed checkpoints, and in TE's layers, the next linear owns them, where
# one takes their output. Those behind a linear stand in the sum that follows it.
_LOCAL_NAMES = {
    "decoder.layers.input_layernorm.weight": "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
    "decoder.layers.pre_mlp_layernorm.weight": "decoder.layers.mlp.linear_fc1.layer_norm_weight",
    "decoder.layers.self_attn_bda.post_layernorm.weight": "decoder.layers.self_attention.linear_proj.post_layernorm.weight",
    "decoder.layers.mlp_bda.post_layernorm.weight": "decoder.layers.mlp.linear_fc2.post_layernorm.weight",
    "decoder.layers.self_attention.q_layernorm.weight": "decoder.layers.self_attention.linear_q_up_proj.layer_norm_weight",
    "decoder.layers.self_attention.kv_layernorm.weight": "decoder.layers.self_attention.linear_kv_up_proj.layer_norm_weight",
}

# HybridModel names the norm behind the last layer otherwise than GPTModel and checkpoints do.
_FINAL_NORM = {"decoder.final_norm.weight": "decoder.final_layernorm.weight"}
_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# Experts one by one, and all of a rank in one grouped linear layer.
_EXPERT_NAMES = (
    re.compile(r"(?P<before>mlp\.experts\.)local_experts\.(?P<expert>\d+)\.(?P<after>.+)"),
    re.compile(r"(?P<before>mlp\.experts\.)(?P<after>linear_fc[12]\.(?:weight|bias))(?P<expert>\d+)"),
)


def canonical_names(parameter: str) -> tuple[tuple[str, ...], Place]:
    """Checkpoint names that a module's parameter may have, without numbers, and its place as the module counts.

    Its own name is first; which it is depends on what the layer holds.
    """
    match = _LAYER_NAME.fullmatch(parameter)
    if not match:
        return (_FINAL_NORM.get(parameter, parameter),), Place()
    rest, expert = match[2], None
    for pattern in _EXPERT_NAMES:
        if found := pattern.fullmatch(rest):
            rest, expert = f"{found['before']}experts.{found['after']}", int(found["expert"])
    name = f"decoder.layers.{rest}"
    names = (name, _LOCAL_NAMES[name]) if name in _LOCAL_NAMES else (name,)
    return names, Place(int(match[1]), expert)


def segments_of(rule: Rule, arch: ModelArchitecture) -> list[Segment]:
    """The rows of the Megatron tensor, from first to last, as runs of rows of its sources."""
    if rule.layout is Layout.GATE_UP_IN_TURNS:
        assert rule.is_stacked, "other sources are read and written by rows that follow each other"
        rows = source_shapes(rule, arch)[0][0] // 2
        return [Segment(0, first, rows, step=2) for first in (0, 1)]
    if rule.layout is not Layout.QKV:
        return [Segment(source, 0, shape[0]) for source, shape in enumerate(source_shapes(rule, arch))]
    key_rows = arch.kv_channels
    query_rows = arch.num_attention_heads // arch.num_query_groups * key_rows
    queries, keys = arch.query_size, arch.key_size
    starts = ((0, 0), (1, 0), (2, 0)) if len(rule.sources) > 1 else ((0, 0), (0, queries), (0, queries + keys))
    segments = []
    for group in range(arch.num_query_groups):
        for (source, start), rows in zip(starts, (query_rows, key_rows, key_rows), strict=True):
            segments.append(Segment(source, start + group * rows, rows))
    return segments


def segments_in(segments: Iterable[Segment], start: int, stop: int) -> list[Segment]:
    """The part of ``segments`` that covers Megatron rows ``[start, stop)``, cut at both ends."""
    found = []
    position = 0
    for segment in segments:
        low, high = max(start, position), min(stop, position + segment.rows)
        if low < high:
            found.append(Segment(segment.source, segment.start + (low - position) * segment.step, high - low, segment.step))
        position += segment.rows
    return found


def check_keys(found: Iterable[str], arch: ModelArchitecture, where: str) -> None:
    """Check that a Hugging Face checkpoint holds exactly the tensors of the model.

    A head stored beside a tied embedding is left to the caller, who can compare the two.

    Raises:
        ConversionError: naming the tensors that are missing and those that nothing would use.
    """
    family = FAMILIES[arch.family]
    expected = {name for rule, place in tensors_of(arch) for name in rule.source_names(place)}
    names = set(found)
    if arch.tied_embeddings:
        names -= set(family.head_sources)
    unused = {name for name in names - expected if not any(re.fullmatch(pattern, name) for pattern in family.ignored)}
    missing = expected - names
    if not unused and not missing:
        return
    lines = [f"{where}: its tensors are not those of a {arch.family} model with {arch.num_layers} layers."]
    lines += [f"  missing ({len(missing)}): {_sample(missing)}"] if missing else []
    lines += [f"  not used ({len(unused)}): {_sample(unused)}"] if unused else []
    fields = "architectures, num_hidden_layers, tie_word_embeddings" + (", the number of experts" if arch.experts else "")
    lines.append(f"Check that config.json belongs to these weights ({fields}).")
    raise ConversionError("\n".join(lines))


def _sample(names: set[str], limit: int = 8) -> str:
    shown = sorted(names)[:limit]
    return ", ".join(shown) + (f", and {len(names) - limit} more" if len(names) > limit else "")
