"""What of ``--quantize-base`` a machine or a model cannot do: a line each, before any model is built."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from megatron_rmipo.config.schema import Config
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.families.base import Rule
from megatron_rmipo.families.targets import is_linear
from megatron_rmipo.families.tensors import megatron_shape, rules_of
from megatron_rmipo.model.lora.quantized import BLOCK
from megatron_rmipo.model.problems.experts import expert_tensor_size
from megatron_rmipo.model.transformer_engine import transformer_engine_layers


def quantization_machine_problems(config: Config) -> Iterator[str]:
    """What is not installed, or is of a kind that takes no quantized weights."""
    kind = config.lora.quantize_base
    if kind is None:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        yield (
            f"--quantize-base {kind} needs bitsandbytes, which is not installed. pip install 'megatron_rmipo[quantize]', or "
            "leave the flag out"
        )
    if transformer_engine_layers(config.model):
        yield f"--quantize-base {kind}: Transformer Engine's layers take no quantized weights; give --transformer-impl local"


def quantization_width_problems(config: Config, arch: ModelArchitecture) -> Iterator[str]:
    """Rows that are no whole blocks on a rank; tensor-parallel sizes must divide the model."""
    kind, parallel = config.lora.quantize_base, config.parallel
    if kind is None:
        return
    sizes = {
        "--tensor-model-parallel-size": (False, parallel.tensor_model_parallel_size),
        "--expert-tensor-parallel-size": (True, expert_tensor_size(parallel)),
    }
    for flag, (of_experts, size) in sizes.items():
        rules = [rule for rule in rules_of(arch) if is_linear(rule, arch) and rule.per_expert == of_experts]
        odd = _odd_rows(rules, arch, size)
        if not odd:
            continue
        works = [fewer for fewer in range(1, size) if size % fewer == 0 and not _odd_rows(rules, arch, fewer)]
        yield (
            f"--quantize-base {kind} keeps rows in blocks of {BLOCK} numbers; at {flag} {size} those on a rank are: "
            f"{', '.join(odd)}; " + (f"would work: {', '.join(map(str, works))}" if works else "leave it out for this model")
        )


def _odd_rows(rules: list[Rule], arch: ModelArchitecture, size: int) -> list[str]:
    """Layers whose rows, where they are cut into ``size``, are no whole blocks, with what numbers those are."""
    rows = {rule: megatron_shape(rule, arch)[1] // (size if rule.cuts_columns else 1) for rule in rules}
    return [f"{rule.megatron.split('.')[-2]} {width}" for rule, width in rows.items() if width % BLOCK]
