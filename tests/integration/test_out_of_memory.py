"""Runs whose memory runs out: what they say, what they leave, and that all ranks stop.

As a module it is such a run: the ranks named in FULL_RANKS have no memory left.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rmipo.checkpoint.megatron.directory import latest_complete_iteration
from megatron_rmipo.model.policy import PolicyModel
from megatron_rmipo.scoring import score_cli
from megatron_rmipo.training import main as trainer
from megatron_rmipo.training import setup
from tests.harness import free_port, run_distributed
from tests.integration.data import MODEL, write_pairs
from tests.integration.test_training import flags, losses, output_of, run

MESSAGE = "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.15 GiB of which 0.5 GiB is free."
CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 3145728 "
    "bytes. Error code 12 (Cannot allocate memory)"
)


class _FullInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logprobs: torch.Tensor) -> torch.Tensor:
        return logprobs.view_as(logprobs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError(MESSAGE)


def run_in_short_memory(arguments: list[str], *, training: bool = True, call: int = 5) -> int:
    """A run in which memory runs out; the exit code.

    Args:
        arguments: of the trainer.
        training: whether in the backward of a gradient pass, else in a forward-only pass.
        call: in which forward of that kind, counted from 1.
    """
    original, calls = PolicyModel.forward, []

    def forward(self: PolicyModel, *inputs: Any, **named: Any) -> Any:
        calls.extend([1] * (self.training == training))
        if self.training == training and len(calls) == call:
            if not training:
                raise RuntimeError(CPU_MESSAGE)
            return _FullInBackward.apply(original(self, *inputs, **named))
        return original(self, *inputs, **named)

    PolicyModel.forward = forward  # type: ignore[method-assign]
    return trainer.main(arguments)


def run_in_short_memory_before(arguments: list[str]) -> int:
    return run_in_short_memory(arguments, training=False, call=9)


def run_without_room_for_the_optimizer(arguments: list[str]) -> int:
    def build(*inputs: Any, **named: Any) -> Any:
        raise torch.OutOfMemoryError(MESSAGE)

    setup.build_training_state = build  # type: ignore[assignment]
    return trainer.main(arguments)


def score_in_short_memory(arguments: list[str]) -> int:
    def forward(self: PolicyModel, *inputs: Any, **named: Any) -> Any:
        raise torch.OutOfMemoryError(MESSAGE)

    PolicyModel.forward = forward  # type: ignore[method-assign]
    return score_cli.main(arguments)


def run_on_two_ranks(arguments: list[str], full_ranks: str) -> str:
    """What the ranks of a run wrote, started with torchrun; memory runs out on the ones that are named."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    ended = subprocess.run(
        [*command, "-m", "tests.integration.test_out_of_memory", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "FULL_RANKS": full_ranks},
        check=False,
    )
    assert ended.returncode != 0
    return ended.stderr


@pytest.mark.dist
def test_the_pack_is_named_with_flags_that_help_and_the_last_checkpoint_stands(tmp_path: Path) -> None:
    prefix, save = write_pairs(tmp_path / "pairs"), tmp_path / "run"
    arguments = flags(prefix, save, load=save, split=None, objective="simpo", save_interval=1, tokens_per_microbatch=900)
    code, output = run_distributed(output_of, 1, run_in_short_memory, arguments)[0]
    assert code == 1, output
    assert "Traceback" not in output
    assert sorted(losses(save)) == [1, 2]
    record = json.loads((save / "logs" / "out_of_memory" / "rank0.json").read_text())
    assert (record["when"], record["pass"], record["in"], record["error"]) == ("step 3", "gradient pass", "backward", MESSAGE)
    pack = record["pack"]
    assert (pack["number"], pack["of"]) == (1, 2)
    assert sum(pair["tokens"] for pair in pack["pairs"]) == pack["tokens"] <= 900
    longest = max(pack["pairs"], key=lambda pair: pair["tokens"])
    message = output[output.index("OutOfMemoryError: ") :].splitlines()
    assert message[0] == (
        "OutOfMemoryError: step 3: out of memory in the backward of the gradient pass, pack 1 of 2 of this rank: "
        f"{pack['tokens']} tokens, {pack['scored_tokens']} of them scored, {len(pack['pairs'])} pairs; the longest, "
        f"{longest['pair']}, {longest['tokens']} tokens."
    )
    assert record["memory"]["asked"] == 3 * 2**29
    assert record["memory"]["free_without_the_pack"] > record["estimate"]["activations"] > 0
    assert f"    {record['suggestions'][0]}" in message
    # The largest pair of the data is the smallest pack; this one did not fit.
    fitted = int(record["suggestions"][0].removeprefix("--tokens-per-microbatch "))
    assert 450 < fitted < pack["tokens"]
    assert message[-1].strip() == f"the checkpoint {save / 'iter_0000002'} is whole: go on with --load {save}"
    assert len(message) < 20
    smaller = flags(prefix, save, load=save, split=None, objective="simpo", tokens_per_microbatch=fitted, train_iters=6)
    assert run_distributed(run, 1, smaller) == [0]
    assert sorted(losses(save)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.dist
def test_a_pass_before_the_gradients_is_named_and_needs_no_activations(tmp_path: Path) -> None:
    prefix, save = write_pairs(tmp_path / "pairs"), tmp_path / "run"
    arguments = flags(prefix, save, split=None, tokens_per_microbatch=700, train_iters=9, use_distributed_optimizer=True)
    code, output = run_distributed(output_of, 1, run_in_short_memory_before, arguments)[0]
    assert code == 1, output
    record = json.loads((save / "logs" / "out_of_memory" / "rank0.json").read_text())
    assert (record["pass"], record["in"]) == ("unconditional pass", "forward")
    assert record["memory"]["asked"] == 3145728
    assert record["estimate"]["activations"] == 0
    assert not any("recompute" in one for one in record["suggestions"])
    assert "no checkpoint was saved yet" in output


@pytest.mark.dist
@pytest.mark.parametrize("full_ranks", ["1", "0,1"])
def test_all_ranks_stop_and_the_cause_is_told_once(tmp_path: Path, full_ranks: str) -> None:
    prefix, save = write_pairs(tmp_path / "pairs"), tmp_path / "run"
    # A pack a step, whatever the order of pairs.
    cut = {"tokens_per_microbatch": 900, "train_iters": 5000}
    arguments = flags(prefix, save, split=None, objective="simpo", save_interval=1, **cut)
    written = run_on_two_ranks(arguments, full_ranks)
    assert written.count("would have fitted") == 1, written
    # The others have no more to say, if torchrun lets them.
    lines = [line for line in written.splitlines() if line.startswith("[rank")]
    teller = "[rank 1] OutOfMemoryError: step 5: " if full_ranks == "1" else " OutOfMemoryError: step 5: "
    assert teller in lines[0], written
    assert len(lines) <= 2, written
    assert all("] stopped, since rank " in line or "Another rank told" in line for line in lines[1:]), written
    assert latest_complete_iteration(save) == 4
    assert sorted(losses(save)) == [1, 2, 3, 4]


@pytest.mark.dist
def test_a_stage_before_the_last_names_the_pack_whose_backward_it_was_in(tmp_path: Path) -> None:
    prefix, save = write_pairs(tmp_path / "pairs"), tmp_path / "run"
    cut = {"tokens_per_microbatch": 900, "pipeline_model_parallel_size": 2, "min_microbatches_per_stage": 0}
    arguments = flags(prefix, save, split=None, objective="simpo", **cut)
    assert "the backward of the gradient pass, pack 1 of 2 of this rank" in run_on_two_ranks(arguments, "0")
    record = json.loads((save / "logs" / "out_of_memory" / "rank0.json").read_text())
    assert (record["when"], record["in"], record["packs_in_flight"]) == ("step 3", "backward", 2)
    assert record["estimate"]["head"] == 0


@pytest.mark.dist
def test_a_model_that_does_not_fit_is_told_with_flags_that_make_it_smaller(tmp_path: Path) -> None:
    prefix, save = write_pairs(tmp_path / "pairs"), tmp_path / "run"
    arguments = [*flags(prefix, save, split=None, objective="simpo"), "--bf16"]
    code, output = run_distributed(output_of, 2, run_without_room_for_the_optimizer, arguments)[1]
    assert code == 1, output
    assert "Traceback" not in output
    assert "OutOfMemoryError: loading the model: out of memory." in output
    record = json.loads((save / "logs" / "out_of_memory" / "rank1.json").read_text())
    assert "pack" not in record
    assert record["standing"]["moments"] == 2 * record["standing"]["master_weights"] > 0
    assert record["suggestions"][0].startswith("--use-distributed-optimizer (")


@pytest.mark.dist
def test_scoring_names_its_pack_and_no_flag_of_training(tmp_path: Path) -> None:
    prefix = write_pairs(tmp_path / "pairs")
    settings = {"load_hf": MODEL, "pairs": prefix, "tokens_per_microbatch": 700}
    arguments = [text for name, value in settings.items() for text in ("--" + name.replace("_", "-"), str(value))]
    code, output = run_distributed(output_of, 1, score_in_short_memory, arguments)[0]
    assert code == 1, output
    assert "Traceback" not in output
    message = output[output.index("OutOfMemoryError: ") :].splitlines()
    assert message[0].startswith(
        f"OutOfMemoryError: log-probs of {prefix}: out of memory in the forward of the scoring pass, pack 1"
    )
    assert "  would have fitted, each line by itself:" in message
    assert not any(word in line for line in message for word in ("optim", "recompute", "gradients", "checkpoint"))
    assert message[-1].strip() == "what was scored is kept: start again"


if __name__ == "__main__":
    full = os.environ["RANK"] in os.environ["FULL_RANKS"].split(",")
    sys.exit(run_in_short_memory(sys.argv[1:]) if full else run(sys.argv[1:]))
