"""What was measured on a GPU: figures derived from it, rows, table, goals."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.gpu_model import FULL_LAYERS, seconds_at
from benchmarks.gpu_parts import PARTS
from benchmarks.gpu_steps import Timing
from benchmarks.inputs import LLAMA_3_8B, RECORDED
from benchmarks.measure import Spread
from benchmarks.report import Goal
from megatron_rmipo.config.schema import DataConfig
from megatron_rmipo.model.flops import known_device, peak_flops

PADDED = "padded (transformers)"
PHASES = ("before", "gradient", "optimizer", "other")
SIZE_NAMES = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")
SIZES = {name: int(getattr(LLAMA_3_8B, name)) for name in SIZE_NAMES}
STEPS = {
    "num_pairs": 64,
    "seq_length": 2048,
    "tokens_per_microbatch": DataConfig().tokens_per_microbatch,
    "baseline_pairs_per_microbatch": 2,
    "head_tokens": 8192,
}
# On one H200, with as many layers as fit.
GOAL_DEVICE, GOAL_SETTINGS = "H200", {"shrink": 1, "num_layers": None, **SIZES, **STEPS}
LEAST_TFLOPS, LEAST_PAIRS_PER_SECOND = {"ultrafeedback": 495.0}, {"ultrafeedback": 12.9}
LEAST_SHARING = {"ultrafeedback": 1.15, "hh": 1.40}
LEAST_OVER_PADDED, LEAST_HEAD_TFLOPS = 6.0, 270.0


@dataclasses.dataclass
class Results:
    """What was measured so far; None, or empty, where it was not yet, or could not be.

    Attributes:
        num_layers: of the model.
        timings: by name of :data:`benchmarks.gpu_steps.VARIANTS`.
        parts: by the same names, seconds of ``PARTS`` in one more step over the last batch.
        padded_seconds: of the padded step over the first of the same batches.
        padded_peak_bytes: most memory in use in it.
        ends_seconds: the part of an RMiPO step that does not depend on the number of layers.
        full_flops: model FLOPs of an RMiPO step with all layers, the mean over the batches.
        head_tflops: of output layer and log-probs alone.
        agreement: the largest relative difference found before.
        problems: what could not be measured, and losses that do not agree; a line each.
    """

    num_layers: int
    timings: dict[str, Timing] = dataclasses.field(default_factory=dict)
    parts: dict[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    padded_seconds: list[float] = dataclasses.field(default_factory=list)
    padded_peak_bytes: int = 0
    ends_seconds: float | None = None
    full_flops: float = 0.0
    head_tflops: float | None = None
    agreement: float | None = None
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def full_seconds(self) -> float | None:
        """What an RMiPO step would take with all layers."""
        if self.ends_seconds is None:
            return None
        seconds = _mean(self.timings["rmipo"].seconds)
        return seconds_at(FULL_LAYERS, measured_layers=self.num_layers, seconds=seconds, ends_seconds=self.ends_seconds)

    @property
    def over_padded(self) -> float | None:
        """How many times longer the padded step takes, over the batches that both took."""
        if not self.padded_seconds:
            return None
        return sum(self.padded_seconds) / sum(self.timings["rmipo"].seconds[: len(self.padded_seconds)])

    def slower(self, name: str) -> float | None:
        """How many times longer a variant takes than RMiPO with shared prompts, packed."""
        if name not in self.timings:
            return None
        return sum(self.timings[name].seconds) / sum(self.timings["rmipo"].seconds)


def make_rows(options: argparse.Namespace, results: Results) -> list[dict[str, Any]]:
    """A row for each way that was measured; what is known of RMiPO alone stands in its row, the first."""
    names = ("lengths", "shrink", "num_pairs", "seq_length", "tokens_per_microbatch", "baseline_pairs_per_microbatch", "repeats")
    settings = {name: getattr(options, name) for name in (*names, "head_tokens", *SIZES)}
    settings["num_layers"] = results.num_layers
    peak = peak_flops(torch.cuda.get_device_name(), torch.bfloat16) if torch.cuda.is_available() else None
    rows = []
    for name, timing in results.timings.items():
        flops = sum(timing.flops) / sum(timing.seconds)
        row = settings | {"method": name} | _rates(options.num_pairs, timing.seconds)
        row |= {f"seconds_{phase}": seconds for phase, seconds in (timing.phases | dict(results.parts.get(name, {}))).items()}
        row |= {"tflops": flops / 1e12} | ({"mfu": flops / peak} if peak else {}) | {"peak_bytes": timing.peak_bytes}
        rows.append(row)
    known: dict[str, float | None] = {
        "agreement": results.agreement,
        "seconds_ends": results.ends_seconds,
        "head_tflops": results.head_tflops,
        "over_padded": results.over_padded,
    }
    if results.full_seconds is not None:
        known["pairs_per_second_at_32_layers"] = options.num_pairs / results.full_seconds
        known["tflops_at_32_layers"] = results.full_flops / results.full_seconds / 1e12
    rows[0] |= {name: figure for name, figure in known.items() if figure is not None}
    if not results.padded_seconds:
        return rows
    padded = settings | {"method": PADDED} | _rates(options.num_pairs, results.padded_seconds)
    return [*rows, padded | {"peak_bytes": results.padded_peak_bytes}]


def _rates(num_pairs: int, seconds: Sequence[float]) -> dict[str, float]:
    rates = dataclasses.asdict(Spread.of([num_pairs / one for one in seconds]))
    return {f"pairs_per_second_{part}": rate for part, rate in rates.items()} | {"seconds": _mean(seconds)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per way, and what was found out of RMiPO beside."""
    first = rows[0]
    lines = [
        f"{first['num_layers']} layers, {first['num_pairs']} pairs a step, {first['lengths']}",
        *([f"losses of two layers agree to {first['agreement']:.1e}"] if "agreement" in first else []),
        f"{'':<24}{'pairs/s':>9}{'TFLOP/s':>9}{'MFU':>7}{'GiB':>7}{'seconds':>9}" + "".join(f"{name:>11}" for name in PHASES),
    ]
    parts = ["of one batch, s:", f"{'':<24}" + "".join(f"{name.replace('_', ' '):>15}" for name in PARTS)]
    for row in rows:
        if f"seconds_{PARTS[0]}" in row:
            parts.append(f"{row['method']:<24}" + "".join(f"{row[f'seconds_{name}']:>15.3f}" for name in PARTS))
        shares = "".join(f"{row[f'seconds_{name}']:>11.3f}" if f"seconds_{name}" in row else f"{'':>11}" for name in PHASES)
        tflops = f"{row['tflops']:.1f}" if "tflops" in row else ""
        mfu = f"{row['mfu']:.1%}" if "mfu" in row else ""
        lines.append(
            f"{row['method']:<24}{row['pairs_per_second_p50']:>9.2f}{tflops:>9}{mfu:>7}{row['peak_bytes'] / 2**30:>7.1f}"
            f"{row['seconds']:>9.3f}{shares}"
        )
    return "\n".join(
        [
            *lines,
            "before: the unconditional pass; gradient: forward and backward",
            *parts,
            "head: the output layer's part of forward and of backward; communication: exposed, none with one GPU",
            *_of_rmipo_alone(first),
        ]
    )


def _of_rmipo_alone(first: Mapping[str, Any]) -> list[str]:
    lines = []
    if "seconds_ends" in first:
        lines += [
            f"embedding, output layer and their optimizer: {first['seconds_ends']:.3f} s of a step",
            f"at {FULL_LAYERS} layers: {first['pairs_per_second_at_32_layers']:.2f} pairs/s, "
            f"{first['tflops_at_32_layers']:.1f} TFLOP/s",
        ]
    if "head_tflops" in first:
        lines.append(f"output layer and log-probs alone: {first['head_tflops']:.1f} TFLOP/s")
    return lines


def goals(options: argparse.Namespace, results: Results) -> list[Goal]:
    """What one H200 was to reach with the sizes of Llama-3-8B, recorded lengths and the defaults of a step; nothing elsewhere."""
    as_meant = GOAL_SETTINGS.items() <= vars(options).items()
    on_device = torch.cuda.is_available() and known_device(torch.cuda.get_device_name()) == GOAL_DEVICE
    if not (as_meant and on_device and options.lengths in RECORDED):
        return []
    name, timing = options.lengths, results.timings["rmipo"]
    held: list[tuple[str, float, float | None]] = [
        ("prompts twice over shared", LEAST_SHARING[name], results.slower("prompts twice")),
        ("padded over ours", LEAST_OVER_PADDED, results.over_padded),
        ("output layer and log-probs, TFLOP/s", LEAST_HEAD_TFLOPS, results.head_tflops),
    ]
    if name in LEAST_TFLOPS:
        tflops = sum(timing.flops) / sum(timing.seconds) / 1e12
        full_rate = None if results.full_seconds is None else options.num_pairs / results.full_seconds
        held += [
            ("model TFLOP/s", LEAST_TFLOPS[name], tflops),
            (f"pairs/s at {FULL_LAYERS} layers", LEAST_PAIRS_PER_SECOND[name], full_rate),
        ]
    # What could not be measured was not reached.
    measured = [(title, least, float("nan") if figure is None else figure) for title, least, figure in held]
    return [Goal(f"GPU, {name}: {title}", least, figure, at_least=True) for title, least, figure in measured]
