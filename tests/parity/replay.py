"""Replay what the RMiPO authors' trainer computed through our whole path, step by step.

    python tests/parity/replay.py DIR [--tp N] [--pp N] [--dp N]

DIR holds ``model/`` (a Hugging Face checkpoint), ``rows.jsonl``, ``pairs.jsonl`` and ``expected.json``; every setting is read
from it. The ranks are started here. Per step theirs and ours are printed; the exit code is 1 where a figure is beyond its bound:
losses 2e-5 relative; margins, gamma, gradient norms and final weight norms 1e-4.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

REPOSITORY = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))

from safetensors.torch import load_file  # noqa: E402

from megatron_rmipo.checkpoint.hf.weights import export_hf, load_hf_weights  # noqa: E402
from megatron_rmipo.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig  # noqa: E402
from megatron_rmipo.data.batches.batch_builder import BatchBuilder  # noqa: E402
from megatron_rmipo.data.batches.batch_layout import BatchLayout  # noqa: E402
from megatron_rmipo.data.encoding.tokenize import load_tokenizer  # noqa: E402
from megatron_rmipo.data.store.pair_store import TokenizedPair  # noqa: E402
from megatron_rmipo.families.hf_config import read_architecture  # noqa: E402
from megatron_rmipo.model.build import build_model  # noqa: E402
from megatron_rmipo.model.flops import forward_cost_model  # noqa: E402
from megatron_rmipo.objectives.base import Objective  # noqa: E402
from megatron_rmipo.objectives.registry import OBJECTIVES, build_objective  # noqa: E402
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime  # noqa: E402
from megatron_rmipo.training.setup import build_training_state  # noqa: E402
from megatron_rmipo.training.step import train_step  # noqa: E402
from tests.harness import run_distributed  # noqa: E402
from tests.integration.problem import collection  # noqa: E402

LOSS_BOUND = 2e-5
BOUND = 1e-4


@dataclasses.dataclass(frozen=True)
class Layout:
    """Parallel sizes of a replay."""

    tp: int = 1
    pp: int = 1
    dp: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp


def read_pairs(directory: Path) -> list[TokenizedPair]:
    rows = [json.loads(line) for line in (directory / "pairs.jsonl").read_text().splitlines()]
    return [TokenizedPair(*(np.array(row[part], dtype=np.int64) for part in ("prompt", "chosen", "rejected"))) for row in rows]


def objective_of(expected: dict[str, Any]) -> Objective:
    """The objective of the run with those of its recorded settings that it has."""
    options = {field.name for field in dataclasses.fields(OBJECTIVES[expected["objective"]].Config)}
    settings = {name: expected[name] for name in options if expected.get(name) is not None}
    if expected["objective"] == "rmipo":
        settings["preset"] = "official"
    return build_objective(expected["objective"], settings)


def config_of(expected: dict[str, Any], layout: Layout) -> Config:
    optimizer = expected["optimizer"]
    assert optimizer["name"] == "AdamW", optimizer
    return Config(
        parallel=ParallelConfig(tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp),
        model=ModelConfig(),
        optimizer=OptimizerConfig(
            lr=optimizer["lr"],
            lr_decay_style=optimizer["schedule"],
            adam_beta1=optimizer["betas"][0],
            adam_beta2=optimizer["betas"][1],
            adam_eps=optimizer["eps"],
            weight_decay=optimizer["weight_decay"],
            clip_grad=optimizer["clip_grad"],
        ),
    )


def replay_on_this_rank(directory: str, layout: Layout) -> dict[str, Any]:
    """Every recorded step on this rank: per step loss, gradient norm and per-pair metrics; at the end the weights' norms."""
    source = Path(directory)
    expected = json.loads((source / "expected.json").read_text())
    groups = initialize_runtime(layout.tp, layout.pp)
    arch = read_architecture(source / "model")
    config = config_of(expected, layout)
    policy = build_model(arch, config, groups)
    load_hf_weights(policy, source / "model", arch, groups=groups)
    state = build_training_state(policy, config, groups, train_iters=len(expected["steps"]))
    objective = objective_of(expected)
    needs = objective.needs
    pairs = read_pairs(source)
    longest = max(2 * pair.prompt.size + pair.chosen.size + pair.rejected.size for pair in pairs)
    tokenizer = load_tokenizer(str(source / "model")).info
    builder = BatchBuilder(
        collection(pairs),
        BatchLayout(
            dp_rank=groups.dp_rank,
            dp_size=groups.dp_size,
            # Several packs a step, so that their sum is put to the test as well.
            tokens_per_microbatch=max(600, longest),
            cost=forward_cost_model(arch),
            with_rejected=needs.rejected,
            unconditional=needs.unconditional,
            bos_token_id=tokenizer.bos_token_id,
        ),
    )
    steps = []
    for step in expected["steps"]:
        outcome = train_step(state, builder.build(np.array(step["pairs"])), objective, groups)
        assert outcome.updated
        steps.append({"grad_norm": outcome.grad_norm, **{name: v.tolist() for name, v in outcome.metrics.values.items()}})
    weights = None
    out = [tempfile.mkdtemp()]
    dist.broadcast_object_list(out, src=0, group=groups.world)
    final = Path(out[0]) / "final"
    export_hf(policy, arch, source / "model", final, dtype=torch.float32, groups=groups)
    if groups.rank == 0:
        tensors = {name: tensor.double() for path in final.glob("*.safetensors") for name, tensor in load_file(path).items()}
        weights = {name: {"l2": tensor.norm().item(), "sum": tensor.sum().item()} for name, tensor in tensors.items()}
    shutdown_runtime()
    return {"steps": steps, "final_weights": weights}


# Their name of a per-pair list, and ours. Their gamma is the margin before beta.
PER_PAIR = {"margins": "rewards/margins", "gamma": "gamma", "delta_pmi": "dpmi"}


def compare(expected: dict[str, Any], ours: dict[str, Any]) -> list[dict[str, float]]:
    """Per step the errors of every figure: relative for loss and gradient norm, absolute over (1 + |theirs|) for the rest."""
    errors = []
    for theirs, mine in zip(expected["steps"], ours["steps"], strict=True):
        loss = sum(mine["loss"]) / len(mine["loss"])
        row = {
            "step": theirs["step"],
            "their loss": theirs["loss"],
            "our loss": loss,
            "loss": abs(loss - theirs["loss"]) / abs(theirs["loss"]),
            "grad_norm": abs(mine["grad_norm"] - theirs["grad_norm"]) / theirs["grad_norm"],
        }
        for their_name, our_name in PER_PAIR.items():
            if their_name in theirs:
                pairs = zip(theirs[their_name], mine[our_name], strict=True)
                row[their_name] = max(abs(a - b) / (1 + abs(a)) for a, b in pairs)
        errors.append(row)
    return errors


def weight_errors(expected: dict[str, Any], ours: dict[str, Any]) -> float:
    """Largest relative error of a tensor's final L2 norm; every tensor of theirs must be there."""
    theirs, mine = expected["final_weights"], ours["final_weights"]
    assert theirs.keys() == mine.keys(), theirs.keys() ^ mine.keys()
    return max(abs(mine[name]["l2"] - theirs[name]["l2"]) / theirs[name]["l2"] for name in theirs)


def token_mismatches(directory: Path) -> list[int]:
    """Rows of ``rows.jsonl`` whose rendered text our tokenizer turns into other ids than theirs."""
    tokenizer = load_tokenizer(str(directory / "model"))
    wrong = []
    rows = [json.loads(line)["rendered"] for line in (directory / "rows.jsonl").read_text().splitlines()]
    for number, (row, pair) in enumerate(zip(rows, read_pairs(directory), strict=True)):
        for branch in ("chosen", "rejected"):
            prompt, response = tokenizer.encode_rendered(row["prompt"], row[branch])
            if list(prompt) != pair.prompt.tolist() or list(response) != getattr(pair, branch).tolist():
                wrong.append(number)
    return wrong


def replay(directory: Path, layout: Layout) -> tuple[list[dict[str, float]], float]:
    """(errors per step, error of the final weights) of a replay at a layout."""
    expected = json.loads((directory / "expected.json").read_text())
    ours = run_distributed(replay_on_this_rank, layout.world_size, str(directory), layout)
    errors = compare(expected, ours[-1])
    return errors, weight_errors(expected, ours[0])


def bound_of(name: str) -> float:
    return LOSS_BOUND if name == "loss" else BOUND


def beyond_bounds(errors: list[dict[str, float]], weights: float) -> list[str]:
    """What is beyond its bound, in words."""
    names = [name for name in errors[0] if name not in ("step", "their loss", "our loss")]
    found = [
        f"step {row['step']}: {name} off by {row[name]:.2e} (bound {bound_of(name):.0e})"
        for row in errors
        for name in names
        if not row[name] <= bound_of(name)
    ]
    return found + ([] if weights <= BOUND else [f"final weight norms off by {weights:.2e} (bound {BOUND:.0e})"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="directory with model/, rows.jsonl, pairs.jsonl, expected.json")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size")
    parser.add_argument("--pp", type=int, default=1, help="pipeline parallel size")
    parser.add_argument("--dp", type=int, default=1, help="data parallel size")
    arguments = parser.parse_args()
    directory = arguments.directory.resolve()
    if not (directory / "expected.json").is_file():
        print(f"{directory}: no expected.json there", file=sys.stderr)
        return 1
    wrong = token_mismatches(directory)
    errors, weights = replay(directory, Layout(arguments.tp, arguments.pp, arguments.dp))
    names = [name for name in errors[0] if name not in ("step", "their loss", "our loss")]
    print(f"{'step':>4} {'their loss':>12} {'our loss':>12} " + " ".join(f"{name:>10}" for name in names))
    for row in errors:
        print(
            f"{row['step']:>4} {row['their loss']:>12.8f} {row['our loss']:>12.8f} " + " ".join(f"{row[n]:>10.1e}" for n in names)
        )
    print(f"final weight norms: {weights:.1e}; rows with other token ids: {wrong or 'none'}")
    problems = beyond_bounds(errors, weights) + ([f"token ids differ in rows {wrong}"] if wrong else [])
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
