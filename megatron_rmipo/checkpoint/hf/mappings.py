"""How the tensors of a Hugging Face checkpoint and of a Megatron model correspond, by the rules of the model's family.

A Megatron tensor is cut along its rows into *segments*, each a run of rows of one Hugging Face tensor; that one description
serves every direction and every layout: a tensor-parallel slice, a streamed piece, merging and un-merging.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable

from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Layout, Rule
from megatron_rmipo.families.registry import FAMILIES
from megatron_rmipo.families.tensors import source_shapes, tensors_of


@dataclasses.dataclass(frozen=True)
class Segment:
    """Rows ``[start, start + rows)`` of source number ``source``, at this place of the Megatron tensor."""

    source: int
    start: int
    rows: int


# The local layer spec names the norms apart; in distributed checkpoints, and in TE's layers, the next linear owns them. Latent
# attention has a norm that no linear owns.
LOCAL_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "self_attention.q_layernorm.weight": "self_attention.linear_q_up_proj.layer_norm_weight",
    "self_attention.kv_layernorm.weight": "self_attention.linear_kv_up_proj.layer_norm_weight",
}

_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def canonical_name(parameter: str, known: Collection[str]) -> tuple[str, int | None]:
    """Checkpoint name of a module's parameter, without the layer number, and that number as the module counts it.

    Args:
        parameter: its name in the model.
        known: names of the checkpoint's tensors.
    """
    match = _LAYER_NAME.fullmatch(parameter)
    if not match:
        return parameter, None
    name = f"decoder.layers.{match[2]}"
    if name not in known:
        name = f"decoder.layers.{LOCAL_NAMES.get(match[2], match[2])}"
    return name, int(match[1])


def segments_of(rule: Rule, arch: ModelArchitecture) -> list[Segment]:
    """The rows of the Megatron tensor, from first to last, as runs of rows of its sources."""
    if rule.layout is not Layout.QKV:
        return [Segment(source, 0, shape[0]) for source, shape in enumerate(source_shapes(rule, arch))]
    key_rows = arch.kv_channels
    query_rows = arch.num_attention_heads // arch.num_query_groups * key_rows
    segments = []
    for group in range(arch.num_query_groups):
        segments += [
            Segment(0, group * query_rows, query_rows),
            Segment(1, group * key_rows, key_rows),
            Segment(2, group * key_rows, key_rows),
        ]
    return segments


def segments_in(segments: Iterable[Segment], start: int, stop: int) -> list[Segment]:
    """The part of ``segments`` that covers Megatron rows ``[start, stop)``, cut at both ends."""
    found = []
    position = 0
    for segment in segments:
        low, high = max(start, position), min(stop, position + segment.rows)
        if low < high:
            found.append(Segment(segment.source, segment.start + low - position, high - low))
        position += segment.rows
    return found


def check_keys(found: Iterable[str], arch: ModelArchitecture, where: str) -> None:
    """Check that a Hugging Face checkpoint holds exactly the tensors of the model.

    A head stored beside a tied embedding is left to the caller, who can compare the two.

    Raises:
        ConversionError: naming the tensors that are missing and those that nothing would use.
    """
    family = FAMILIES[arch.family]
    expected = {name for rule, layer in tensors_of(arch) for name in rule.source_names(layer)}
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
    lines.append("Check that config.json belongs to these weights (num_hidden_layers, tie_word_embeddings, architectures).")
    raise ConversionError("\n".join(lines))


def _sample(names: set[str], limit: int = 8) -> str:
    shown = sorted(names)[:limit]
    return ", ".join(shown) + (f", and {len(names) - limit} more" if len(names) > limit else "")
