"""A plan in words: what a layout needs and takes, its flags, and how it is started."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_rmipo.config.flags.planning import PlanningConfig
from megatron_rmipo.config.schema import Config
from megatron_rmipo.config.unknown_flags import flag_of
from megatron_rmipo.planning.plan import Estimate, Plan, why_not
from megatron_rmipo.planning.short_numbers import figure

ESTIMATED = "Estimated from lengths, sizes and data sheets; nothing was run."
# What the command of a run says by itself.
_SECTIONS = ("parallel", "model", "lora", "memory", "experts", "data", "training")
_LINE = 110


def describe_plan(plan: Plan, title: str, num_pairs: int) -> str:
    """All of it.

    Args:
        plan: it.
        title: the model and the data.
        num_pairs: of an epoch.
    """
    best = plan.best
    lines = [title, f"on {best.cluster}; {plan.num_layouts} layouts looked at. {ESTIMATED}", ""]
    lines += describe_layout(best, num_pairs)
    lines += ["", "why not"]
    lines += [f"  {one.name}: {why_not(one, best)}" for one in (*plan.others, *plan.too_large)]
    lines += ["", "start, on each node", command(best)]
    return "\n".join(lines)


def describe_layout(one: Estimate, num_pairs: int, unit: str = "epoch") -> list[str]:
    """What it needs and takes, a line each.

    Args:
        one: the layout.
        num_pairs: of the unit.
        unit: what its time is told of.
    """
    assert one.step is not None
    batch = one.load.num_pairs
    steps = -(-num_pairs // batch)
    hours = steps * one.seconds / 3600
    parts = ", ".join(f"{name} {figure(seconds)}" for name, seconds in one.step.parts.items() if seconds >= 0.002 * one.seconds)
    rate = one.load.num_tokens / one.seconds / one.cluster.gpus
    share = one.step.flops_per_gpu / one.cluster.gpu.peak
    return [
        f"layout   {one.name}",
        f"memory   {one.memory_line}",
        f"step     {figure(one.seconds)} s of {batch} pairs in {one.load.num_packs} packs a rank: {parts}",
        f"{unit:8} {steps} steps, {figure(hours)} h, {figure(hours * one.cluster.gpus)} GPU-hours; {figure(rate)} tokens and "
        f"{figure(one.step.flops_per_gpu / 1e12)} model TFLOP/s a GPU ({share:.0%} of its peak)",
    ]


def layout_flags(config: Config) -> list[str]:
    """The flags of a configuration that are not at their defaults: those of layout, adapter, memory, packs and batch."""
    flags = []
    for name in _SECTIONS:
        section, defaults = getattr(config, name), getattr(Config(), name)
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if value != getattr(defaults, field.name):
                flags += _flag(field.name, value)
    return flags


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag_of(name) if value else flag_of(name).replace("--", "--no-", 1)]
    return [flag_of(name), *map(str, value if isinstance(value, list) else [value])]


def command(one: Estimate) -> str:
    """The torchrun line, over several lines of the screen."""
    cluster = one.cluster
    words = [f"torchrun --nproc-per-node {cluster.gpus_per_node}"]
    if cluster.nodes > 1:
        words += [f"--nnodes {cluster.nodes}", "--node-rank $NODE_RANK", "--master-addr $MASTER_ADDR", "--master-port 6000"]
    flags = layout_flags(dataclasses.replace(one.config, planning=PlanningConfig()))
    words += ["-m megatron_rmipo.train", "--load-hf $HF_MODEL", "--data-path $DATA"]
    for word in flags:
        if word.startswith("--"):
            words.append(word)
        else:
            words[-1] += f" {word}"
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) > _LINE:
            lines.append("")
        lines[-1] += f" {word}"
    return " \\\n   ".join(f"  {line.strip()}" if number == 0 else line for number, line in enumerate(lines))
