"""Numbers for adapters of Megatron-Bridge, the same at any layout, and the Hugging Face model that they make of another.

Shape letters: R rows of a projection, C its columns, r the adapter's rank.
"""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Layout
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.families.segments import rank_columns, rank_rows, segments_of
from megatron_rmipo.families.tensors import megatron_shape, rules_of
from megatron_rmipo.runtime.groups import ProcessGroups

KINDS = ("LoRA", "CanonicalLoRA", "DoRA")
DIM, ALPHA = 4, 6.0
_PART = {"q": 0, "k": 1, "v": 2, "gate": 0, "up": 1}


def factor(name: str, *shape: int) -> Tensor:
    """fp32: of a name in the whole model."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return 0.1 * torch.randn(*shape, generator=generator)


def fill_adapters(model: Any, arch: ModelArchitecture, groups: ProcessGroups) -> int:
    """Give the adapters of this rank's part of a model, not wrapped, their numbers; how many tensors those are."""
    first, count = model.decoder.layers[0].layer_number - 1, 0
    rules = {rule.megatron: rule for rule in rules_of(arch)}
    for name, parameter in model.named_parameters():
        match = re.fullmatch(
            r"decoder\.layers\.(\d+)\.(.+)\.adapter\.(?:adapter_(\w+)\.)?(linear_in\.weight|linear_out\.weight|weight_magnitude)",
            name,
        )
        if match is None:
            assert not parameter.requires_grad
            continue
        number, module, part, kind = int(match[1]) + first, match[2], match[3], match[4]
        rule = rules[f"decoder.layers.{module}.weight"]
        num_rows, num_columns = megatron_shape(rule, arch)
        tp, own = (groups.tp.rank(), groups.tp.size()), f"{number}.{module}.{part}.{kind}"
        if kind == "linear_in.weight":
            whole = factor(own, DIM, num_columns)
            cut = whole[:, rank_columns(rule, num_columns, *tp)] if rule.cuts_columns else whole.chunk(tp[1])[tp[0]]
        elif part is None:
            whole = factor(own, num_rows, DIM) if kind == "linear_out.weight" else 1 + factor(own, num_rows)
            runs = rank_rows(rule, num_rows, *tp)
            if rule.cuts_columns and kind == "linear_out.weight":
                cut = whole.chunk(tp[1])[tp[0]]
            else:
                cut = torch.cat([whole[start:stop] for start, stop in runs])
        else:
            rows = sum(segment.rows for segment in segments_of(rule, arch) if segment.source == _PART[part])
            cut = factor(own, rows, DIM).chunk(tp[1])[tp[0]]
        with torch.no_grad():
            parameter.copy_(cut)
        count += 1
    return count


def write_adapted(hf_dir: Path, save_dir: Path, kind: str) -> Path:
    """The Hugging Face model with the same adapters in its weights."""
    arch, weights = read_architecture(hf_dir), load_file(hf_dir / "model.safetensors")
    for rule in rules_of(arch):
        if rule.layout not in (Layout.QKV, Layout.GATE_UP, Layout.HEAD_COLUMNS, Layout.FFN_COLUMNS):
            continue
        module = rule.megatron.removeprefix("decoder.layers.").removesuffix(".weight")
        num_rows, num_columns = megatron_shape(rule, arch)
        for layer in range(arch.num_layers):
            names = [source.format(layer=layer) for source in rule.sources]
            parts: list[Any] = [None] * len(names)
            if kind == "CanonicalLoRA" and len(names) > 1:
                parts = list("qkv" if rule.layout is Layout.QKV else ("gate", "up"))
            position = 0
            begun = dict.fromkeys(names, 0)
            for segment in segments_of(rule, arch):
                name, part = names[segment.source], parts[segment.source]
                own = f"{layer}.{module}.{part}"
                a = factor(f"{own}.linear_in.weight", DIM, num_columns).double()
                rows = num_rows if part is None else weights[name].shape[0]
                at = position if part is None else begun[name]
                b = factor(f"{own}.linear_out.weight", rows, DIM)[at : at + segment.rows].double()
                target = weights[name][segment.places]
                changed = target.double() + ALPHA / DIM * b @ a
                if kind == "DoRA":
                    lengths = (1 + factor(f"{own}.weight_magnitude", num_rows))[position : position + segment.rows].double()
                    changed *= (lengths / changed.norm(dim=1))[:, None]
                target.copy_(changed)
                position += segment.rows
                begun[name] += segment.rows
    save_dir.mkdir()
    save_file(weights, save_dir / "model.safetensors", {"format": "pt"})
    (save_dir / "config.json").write_text(json.dumps(json.loads((hf_dir / "config.json").read_text())))
    return save_dir
