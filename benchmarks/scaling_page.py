"""docs/scaling.md: plans as tools/plan_layout.py prints them, and the step times of the planner beside published ones.

    python -m benchmarks.scaling_page            # writes the page
    python -m benchmarks.scaling_page --check    # exits with 1 where it is not what the planner says; some minutes

The text stands in scaling_template.md; ``{{name}}`` in it is where a table or a plan goes. Published steps: published_steps.csv.
"""

from __future__ import annotations

import csv
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if not __package__:  # Started as a file.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.generated_page import fill, write_or_compare
from benchmarks.performance_page import markdown
from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.flags.planning import PlanningConfig
from megatron_rmipo.config.schema import Config, ExpertsConfig, ModelConfig
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.planning.cli import find_plan
from megatron_rmipo.planning.hardware import read_cluster
from megatron_rmipo.planning.report import describe_plan
from megatron_rmipo.planning.shapes import read_shape
from megatron_rmipo.planning.step_time import StepSeconds, step_seconds
from megatron_rmipo.planning.workload import equal_sequences

FOLDER = Path(__file__).parent
PAGE, TEMPLATE, PUBLISHED = FOLDER.parent / "docs" / "scaling.md", FOLDER / "scaling_template.md", FOLDER / "published_steps.csv"
LENGTHS = "benchmarks/lengths/ultrafeedback.csv"
NUM_PAIRS = 61135
MODELS = ("llama3-8b", "llama3-70b", "qwen3-30b-a3b", "qwen3-235b-a22b")
NODES = (1, 4, 16, 64)
# Pairs of a step: those of the paper on one node, and as many more as there are nodes.
PAIRS_PER_NODE = 128
# Whole plans that the page prints.
PLANS = {
    "plan_8b": f"--hf-model llama3-8b --data {LENGTHS} --num-pairs {NUM_PAIRS} --gpus 8",
    "plan_70b": f"--hf-model llama3-70b --data {LENGTHS} --num-pairs {NUM_PAIRS} --gpus 32",
    "plan_30b": f"--hf-model qwen3-30b-a3b --data {LENGTHS} --num-pairs {NUM_PAIRS} --gpus 16",
    "plan_long": "--hf-model llama3.1-8b --lengths 98000,1000,1000 --num-pairs 2000 --seq-length 100000 --gpus 32 --show 3",
}
Row = Mapping[str, str]


def published_rows() -> list[dict[str, str]]:
    """The steps that others have published."""
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def our_step(row: Row) -> StepSeconds:
    """What the planner makes of a published step."""
    arch = read_shape(row["model"])
    tensor, pipeline, chunks, context, experts, gpus = (int(row[name]) for name in ("tp", "pp", "vpp", "cp", "ep", "gpus"))
    odd = arch.num_layers % pipeline > 0
    config = Config(
        parallel=ParallelConfig(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            num_virtual_stages_per_pipeline_rank=chunks if chunks > 1 else None,
            account_for_embedding_in_pipeline_split=odd,
            account_for_loss_in_pipeline_split=odd,
            context_parallel_size=context,
            # Those runs hand keys on in a ring, and compute attention once.
            cp_comm_type="p2p",
            expert_model_parallel_size=experts,
            expert_tensor_parallel_size=1 if experts > 1 else None,
            sequence_parallel=tensor > 1,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        ),
        model=ModelConfig(bf16=True),
        experts=ExpertsConfig(moe_token_dispatcher_type="flex" if row["dispatcher"] == "flex" else "alltoall"),
    )
    replicas, sequences = gpus // (tensor * pipeline * context), int(row["mbs"])
    load = equal_sequences(arch, int(row["seq_length"]), int(row["gbs"]) // replicas // sequences, sequences, replicas=replicas)
    cluster = read_cluster(PlanningConfig(gpu="h100"), gpus)
    return step_seconds(arch, config, cluster, load, tensor_overlapped=bool(row["tp_overlap"]))


def published_table() -> str:
    """Published steps beside ours, with what is wrong with ours."""
    titles = ("model", "H100", "layout", "sequence", "batch", "published, s", "planner, s", "error", "TFLOP/s a GPU", "source")
    lines = []
    for row in published_rows():
        ours, seconds = our_step(row), float(row["seconds"])
        names = {"TP": "tp", "PP": "pp", "VPP": "vpp", "CP": "cp", "EP": "ep"}
        layout = " x ".join(f"{name} {row[key]}" for name, key in names.items() if row[key] != "1")
        error = f"{ours.total / seconds - 1:+.1%}" + (f" (fitted: {row['fitted']})" if row["fitted"] else "")
        lines.append(
            (
                *(row["model"], row["gpus"], layout, row["seq_length"], row["gbs"], f"{seconds:g}", f"{ours.total:.2f}", error),
                *(f"{ours.flops_per_gpu / 1e12:.0f}", row["source"]),
            )
        )
    return markdown(titles, lines)


def layouts_line(model: str, nodes: int) -> tuple[str, ...]:
    """The recommended layout on so many nodes of 8 GPUs."""
    gpus = 8 * nodes
    arguments = f"--hf-model {model} --data {LENGTHS} --num-pairs {NUM_PAIRS} --gpus {gpus}"
    try:
        plan, _, _ = find_plan(shlex.split(f"{arguments} --global-batch-size {PAIRS_PER_NODE * nodes} --show 1"))
    except ConfigError as error:
        needed = re.search(r"(\d+) GPUs would do", str(error))
        return (model, str(nodes), f"does not fit; {needed[1] if needed else 'no'} GPUs would do", *[""] * 5)
    best = plan.best
    waiting = best.step.parts.get("waiting", 0.0) / best.seconds if best.step else 0.0
    rate = best.load.num_tokens / best.seconds / gpus
    hours = NUM_PAIRS / best.load.num_pairs * best.seconds * gpus / 3600
    memory = f"{best.memory.peak / 2**30:.0f}"
    return (model, str(nodes), best.name, memory, f"{best.seconds:.2f}", f"{waiting:.0%}", f"{rate:,.0f}", f"{hours:.1f}")


def layouts_table(models: Sequence[str] = MODELS, nodes: Sequence[int] = NODES) -> str:
    """Recommended layouts."""
    titles = ("model", "nodes", "layout", "GiB a rank", "step, s", "waiting", "tokens/s a GPU", "GPU-hours an epoch")
    return markdown(titles, [layouts_line(model, number) for model in models for number in nodes])


def printed_plan(arguments: str) -> str:
    """A command and what it prints."""
    plan, title, num_pairs = find_plan(shlex.split(arguments))
    return f"```\npython tools/plan_layout.py {arguments}\n```\n\n```text\n{describe_plan(plan, title, num_pairs)}\n```"


def render() -> str:
    """The page."""
    shown = {"published": published_table(), "layouts": layouts_table()}
    shown |= {name: printed_plan(arguments) for name, arguments in PLANS.items()}
    return fill(TEMPLATE, shown)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or compare it."""
    prog = "python -m benchmarks.scaling_page"
    return write_or_compare(PAGE, render, argv, prog=prog, stale="not what the planner says. Run: make scaling")


if __name__ == "__main__":
    sys.exit(main())
