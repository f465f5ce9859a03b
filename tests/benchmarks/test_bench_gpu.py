"""The benchmark of a GPU, as far as a machine without one shows it: everything runs, and what is computed from it is right."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import bench_gpu, gpu_parts, gpu_results, gpu_steps
from benchmarks.gpu_model import layers_that_fit, seconds_at
from benchmarks.gpu_parts import PARTS, gradient_parts, watched
from benchmarks.gpu_results import Results
from benchmarks.gpu_steps import VARIANTS, Timing, WaitingTimer, build_batches, time_padded, time_steps, without_layers
from benchmarks.inputs import LLAMA_3_8B, Pairs, random_pairs
from benchmarks.report import read_rows
from benchmarks.sides import build_state, minimum_flops, trainer_config
from megatron_rmipo.data.batches.packing import pack_pairs
from megatron_rmipo.families.architecture import ModelArchitecture, Rope
from megatron_rmipo.memory.estimate import pack_memory
from megatron_rmipo.memory.pack import PackSize
from megatron_rmipo.memory.standing import standing_memory
from megatron_rmipo.model.attention.packed import BACKENDS, choose_backend
from megatron_rmipo.model.packed_model import head_weight
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime
from megatron_rmipo.training.step import evaluate_batch
from tests.harness import run_distributed

ROOT = Path(__file__).parents[2]
ARCH = ModelArchitecture(
    family="llama",
    num_layers=3,
    hidden_size=12,
    ffn_hidden_size=20,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=6,
    vocab_size=58,
    max_position_embeddings=64,
    ropes=(Rope(10000.0),),
    layernorm_epsilon=1e-5,
)


def test_layers_that_fit_are_those_that_the_estimate_says() -> None:
    config, tokens = trainer_config(bf16=True), 500
    standing = standing_memory(dataclasses.replace(ARCH, num_layers=5), config, 1, 0).total
    # bf16 weights, fp32 gradients, three fp32 numbers of the optimizer; a layer has 12 x (12 + 12 + 6 + 6) + 3 x 12 x 20 + 24.
    assert standing == 18 * (5 * 1176 + 2 * 128 * 12 + 12)
    packs = [(PackSize(500, 500), True), (PackSize(1000, 1000), False)]
    arch = dataclasses.replace(ARCH, num_layers=5)
    peaks = [pack_memory(arch, config, size, backward=backward, fused=True).peak for size, backward in packs]
    # A hair more, so that nine tenths of it are not rounded below.
    enough = (standing + max(peaks)) / 0.9 * (1 + 1e-12)
    for memory, expected in ((enough, 5), (enough - 2, 4), (standing, 0), (0, 0), (1e12, 32)):
        assert layers_that_fit(ARCH, config, memory, tokens) == expected


def test_seconds_of_the_whole_model_by_hand() -> None:
    assert seconds_at(32, measured_layers=8, seconds=3.0, ends_seconds=1.0) == 1.0 + 2.0 * 4
    assert seconds_at(8, measured_layers=8, seconds=3.0, ends_seconds=1.0) == 3.0


def losses_by_variant() -> dict[str, list[float]]:
    groups = initialize_runtime(1, 1, seed=3)
    state = build_state(ARCH, groups, bf16=False)
    torch.nn.init.normal_(state.policy[0].embedding.word_embeddings.weight, std=1.0)
    lengths = np.array([[3, 4, 2], [5, 1, 7], [2, 6, 3], [4, 3, 3]])
    pairs = random_pairs(lengths, ARCH.vocab_size, np.random.default_rng(5))
    found = {"least FLOPs": [minimum_flops(ARCH, Pairs(pairs[first : first + 2]), "rmipo") for first in (0, 2)]}
    for name, variant in VARIANTS.items():
        batches = build_batches(pairs, state, variant, batch_size=2, tokens=24)
        assert len(batches) == 2
        metrics = [evaluate_batch(state, batch, build_objective(variant.objective, {}), groups) for batch in batches]
        found[name] = torch.cat([one.values["loss"] for one in metrics]).tolist()
        found[f"{name}: unconditional rows"] = [float(len(batch.unconditional)) for batch in batches]
        found[f"{name}: FLOPs"] = [batch.cost for batch in batches]
        found[f"{name}: rows"] = [float(len(batch.conditional)) for batch in batches]
        found[f"{name}: tokens"] = [float(sum(row.num_tokens for row in batch.conditional)) for batch in batches]
    return found


@pytest.mark.dist
def test_every_way_to_lay_out_gives_the_same_losses() -> None:
    (found,) = run_distributed(losses_by_variant, 1)
    for name in ("prompts twice", "a pair a micro-batch"):
        assert found[name] == pytest.approx(found["rmipo"], rel=1e-5)
    assert found["simpo"] != pytest.approx(found["rmipo"], rel=1e-3)
    assert found["a pair a micro-batch: rows"] == [2.0, 2.0]
    assert found["rmipo: rows"] == [1.0, 1.0]
    # Prompts once, responses without their last token.
    assert found["rmipo: tokens"] == [3 + 3 + 1 + 5 + 0 + 6, 2 + 5 + 2 + 4 + 2 + 2]
    assert found["prompts twice: tokens"] == [18 + 3 + 5, 17 + 2 + 4]
    assert found["simpo: unconditional rows"] == [0.0, 0.0]
    assert found["rmipo: unconditional rows"] == [1.0, 1.0]
    # What the loss needs does not depend on how it is laid out.
    assert found["prompts twice: FLOPs"] == found["a pair a micro-batch: FLOPs"] == found["rmipo: FLOPs"] == found["least FLOPs"]


@pytest.mark.parametrize("name", ["rmipo", "prompts twice", "a pair a micro-batch"])
def test_rows_are_padded_as_the_trainers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = random_pairs(np.array([[3, 4, 2], [5, 1, 7]]), ARCH.vocab_size, np.random.default_rng(5))
    state: Any = SimpleNamespace(policy=SimpleNamespace(architecture=ARCH))

    def sizes() -> set[int]:
        (batch,) = build_batches(pairs, state, VARIANTS[name], batch_size=2, tokens=200)
        return {row.num_tokens for row in batch.rows}

    assert max(sizes()) < 30
    # Where attention works on blocks, rows are whole blocks.
    monkeypatch.setitem(BACKENDS, choose_backend("auto", ARCH.kv_channels), 128)
    assert sizes() == {128}


class SlowGradient(torch.autograd.Function):
    """The identity, whose gradient takes a while."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        time.sleep(PAUSE)
        return grad


PAUSE = 0.05


def parts_with_pauses(place: str) -> tuple[dict[str, float], int, int]:
    """(parts of a pass in which one place takes a while longer, spans of forward, packs of the gradient pass)."""
    groups = initialize_runtime(1, 1, seed=3)
    state = build_state(ARCH, groups, bf16=False)
    pairs = random_pairs(np.array([[3, 4, 2], [5, 1, 7]]), ARCH.vocab_size, np.random.default_rng(5))
    (batch,) = build_batches(pairs, state, VARIANTS["a pair a micro-batch"], batch_size=2, tokens=24)
    module = state.policy[0].output_layer if place.startswith("head") else state.policy[0].decoder
    original = module.forward

    def slow(*args: Any, **kwargs: Any) -> Any:
        if place.endswith("forward") and torch.is_grad_enabled():
            time.sleep(PAUSE)
        if place == "head backward":
            args = (SlowGradient.apply(args[0]), *args[1:])
        output = original(*args, **kwargs)
        return SlowGradient.apply(output) if place == "backward" else output

    module.forward = slow
    parts = gradient_parts(state, batch, "rmipo", groups)
    with watched(state.policy[0]) as spans:
        evaluate_batch(state, batch, build_objective("rmipo", {}), groups)
        without_gradient = spans.count("forward")
    return parts, without_gradient, len(batch.conditional)


@pytest.mark.dist
@pytest.mark.parametrize("place", ["forward", "backward", "head forward", "head backward"])
def test_a_pause_counts_where_it_is_made(place: str) -> None:
    ((parts, without_gradient, num_packs),) = run_distributed(parts_with_pauses, 1, place)
    assert tuple(parts) == PARTS
    assert parts["communication"] == 0
    assert without_gradient == 0
    assert 0 < parts["head_forward"] < parts["forward"]
    assert 0 < parts["head_backward"] < parts["backward"]
    pauses = num_packs * PAUSE
    assert num_packs == 2
    part = place.removeprefix("head ")
    outside = parts[part] - parts[f"head_{part}"]
    assert (parts[f"head_{part}"] if place.startswith("head") else outside) >= pauses


class TimerOfAnHour(WaitingTimer):
    """Says that the gradient pass took an hour."""

    def take(self) -> dict[str, float]:
        return super().take() | {"gradient": 3600.0}


def parts_of_an_hour() -> dict[str, float]:
    gpu_parts.WaitingTimer = TimerOfAnHour
    return parts_with_pauses("forward")[0]


@pytest.mark.dist
def test_backward_is_what_forward_leaves() -> None:
    (parts,) = run_distributed(parts_of_an_hour, 1)
    assert parts["backward"] == 3600 - parts["forward"]


def test_the_peak_is_forgotten_before_the_warm_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []

    def step(_state: Any, batch: Any, _objective: Any, _groups: Any, timer: Any = None) -> None:
        taken.append(batch.cost)
        if timer is not None:
            with timer.phase("gradient"):
                pass

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_steps, "train_step", step)
    monkeypatch.setattr(gpu_steps, "forget_peak_memory", lambda: taken.append("forget"))
    batches: list[Any] = [SimpleNamespace(cost=number) for number in range(4)]
    nothing: Any = None
    timing = time_steps(nothing, batches, "rmipo", nothing, warmups=2)
    assert taken == ["forget", 0, 1, 2, 3]
    assert timing.flops == [2, 3]


def logprobs_with_and_without_layers() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(without layers, the same by hand, with layers, with layers before)."""
    groups = initialize_runtime(1, 1, seed=3)
    policy = build_state(ARCH, groups, bf16=False).policy[0]
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    pair = random_pairs(np.array([[3, 4, 2]]), ARCH.vocab_size, np.random.default_rng(5))[0]
    row = pack_pairs([pair], [0])
    inputs = {name: getattr(row, name) for name in ("token_ids", "position_ids", "segments", "source", "target")}
    with torch.no_grad():
        before = policy(**inputs)
        with without_layers(policy):
            without = policy(**inputs)
        after = policy(**inputs)
        hidden = policy.embedding.word_embeddings.weight[row.token_ids].double()
        hidden = hidden * (hidden.square().mean(1, keepdim=True) + ARCH.layernorm_epsilon).rsqrt()
        hidden = hidden * policy.decoder.final_layernorm.weight.double()
        logits = hidden[row.source] @ head_weight(policy)[: ARCH.vocab_size].double().t()
        by_hand = logits.log_softmax(-1).gather(-1, row.target[:, None])[:, 0]
    return without, by_hand, after, before


@pytest.mark.dist
def test_the_ends_are_embedding_norm_and_output_layer() -> None:
    ((without, by_hand, after, before),) = run_distributed(logprobs_with_and_without_layers, 1)
    torch.testing.assert_close(without.double(), by_hand, rtol=1e-5, atol=1e-5)
    assert torch.equal(after, before)
    assert (after - without).abs().max() > 1e-2


def test_the_padded_step_takes_the_batches_that_are_timed() -> None:
    taken: list[slice] = []
    assert len(time_padded(taken.append, 2, 10, warmups=3)) == 2
    assert taken == [slice(0, 10), slice(30, 40), slice(40, 50)]


def results() -> Results:
    def timing(*seconds: float) -> Timing:
        return Timing(list(seconds), {"before": 1.0, "gradient": 2.0, "optimizer": 0.5, "other": 0.5}, [990e12, 1010e12], 2**30)

    seconds = {"rmipo": (1.5, 2.5), "simpo": (1.0, 2.0), "prompts twice": (2.0, 2.8), "a pair a micro-batch": (4.0, 4.0)}
    timings = {name: timing(*values) for name, values in seconds.items()}
    parts = {name: dict(zip(PARTS, (0.75, 1.25, 0.25, 0.375, 0.0), strict=True)) for name in seconds}
    return Results(16, timings, parts, [9.6], 2**31, ends_seconds=0.5, full_flops=1750e12, head_tflops=269.0, agreement=0.01)


def test_what_is_derived_from_the_timings_by_hand() -> None:
    found = results()
    assert found.full_seconds == 0.5 + 1.5 * 2
    assert found.slower("prompts twice") == pytest.approx(1.2)
    # The padded step took the first of the two batches.
    assert found.over_padded == pytest.approx(6.4)
    rows = gpu_results.make_rows(bench_gpu.parse_options(["--num-pairs", "70", "--repeats", "2"]), found)
    assert [row["method"] for row in rows] == [*VARIANTS, gpu_results.PADDED]
    assert rows[0]["tflops"] == pytest.approx(2000 / 4)
    assert rows[0]["pairs_per_second_at_32_layers"] == pytest.approx(70 / 3.5)
    assert rows[0]["tflops_at_32_layers"] == pytest.approx(500)
    assert rows[1]["pairs_per_second_p50"] == pytest.approx((70 + 35) / 2)
    assert rows[-1]["pairs_per_second_p50"] == pytest.approx(70 / 9.6)
    assert [rows[0][f"seconds_{name}"] for name in PARTS] == [0.75, 1.25, 0.25, 0.375, 0.0]
    lines = gpu_results.table(rows).splitlines()
    assert [line.split()[-5:] for line in lines if line.startswith("simpo")][1] == ["0.750", "1.250", "0.250", "0.375", "0.000"]
    assert all(row["num_layers"] == 16 and row["hidden_size"] == 4096 for row in rows)


def test_goals_are_those_of_one_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    def verdicts(*arguments: str) -> list[tuple[str, float, float, bool]]:
        goals = gpu_results.goals(bench_gpu.parse_options(arguments), results())
        return [(goal.name.split(": ")[1].split(",")[0], goal.limit, round(goal.measured, 6), goal.reached) for goal in goals]

    assert verdicts() == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    common = [("padded over ours", 6.0, 6.4, True), ("output layer and log-probs", 270.0, 269.0, False)]
    assert verdicts() == [
        ("prompts twice over shared", 1.15, 1.2, True),
        *common,
        ("model TFLOP/s", 495.0, 500.0, True),
        ("pairs/s at 32 layers", 12.9, 18.285714, True),
    ]
    assert verdicts("--lengths", "hh") == [("prompts twice over shared", 1.40, 1.2, False), *common]
    for other in shlex.split(
        "'--hidden-size 2048' '--shrink 2' '--lengths a.jsonl' '--num-layers 4' '--num-pairs 32' '--seq-length 1024' "
        "'--tokens-per-microbatch 1024' '--baseline-pairs-per-microbatch 1' '--head-tokens 64'"
    ):
        assert verdicts(*other.split()) == [], other
    for device in ("NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB", "NVIDIA H200 NVL"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=device: device)
        assert verdicts() == [], device


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="needs a GPU, and torch finds none"):
        bench_gpu.main([])


def test_what_cannot_be_measured_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="7 steps take 7000 pairs, but --lengths ultrafeedback holds 1200"):
        bench_gpu.main(["--num-layers", "2", "--num-pairs", "1000"])
    for arguments, message in (
        (["--repeats", "0"], "--repeats 0: must be"),
        (["--baseline-batches", "6"], "no more than --repeats 5"),
    ):
        with pytest.raises(SystemExit):
            bench_gpu.parse_options(arguments)
        assert message in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="without torchrun"):
        bench_gpu.main(["--num-layers", "2"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the memory of a GPU there")
def test_a_model_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    options = bench_gpu.parse_options([])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (139 * 2**30, 140 * 2**30))
    assert 10 < bench_gpu.choose_layers(options, LLAMA_3_8B) < 32
    assert bench_gpu.choose_layers(argparse.Namespace(num_layers=3), LLAMA_3_8B) == 3
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (16 * 2**30, 16 * 2**30))
    with pytest.raises(SystemExit, match="not one layer fits into 16 GiB"):
        bench_gpu.choose_layers(options, LLAMA_3_8B)


SMALL = shlex.split(
    "--num-layers 3 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --num-query-groups 2 --vocab-size 200 "
    "--shrink 8 --num-pairs 7 --warmups 1 --repeats 2 --tokens-per-microbatch 512 --head-tokens 37 --json"
)


def run_with_trouble(csv: str) -> tuple[list[int], str, list[list[str]]]:
    """Losses differ, and the padded side has no memory: exit codes, stderr, what was known of RMiPO at each padded step."""
    known: list[list[str]] = []

    def no_memory(*_: Any, **__: Any) -> Any:
        rows = read_rows(Path(csv))
        known.append([name for name, value in rows[0].items() if value] if rows else [])
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    bench_gpu.run_padded = no_memory
    bench_gpu.TOLERANCES = {"simpo": 0.0}
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        codes = [bench_gpu.main([*SMALL, "--csv", csv])]
        shutdown_runtime()
        bench_gpu.padded_step = lambda *_, **__: no_memory
        codes.append(bench_gpu.main([*SMALL, "--csv", csv, "--check"]))
    return codes, said.getvalue(), known


@pytest.mark.dist
@pytest.mark.slow
def test_a_difference_or_memory_that_runs_out_costs_no_other_figure(tmp_path: Path) -> None:
    ((codes, said, known),) = run_distributed(run_with_trouble, 1, str(tmp_path / "gpu.csv"))
    assert codes == [0, 1]
    assert re.search(
        r"warning: simpo: ours and the padded step do not agree: losses \d.*, gradient norm \d.*, tolerance 0e\+00", said
    )
    lost = "not measured, memory ran out: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert said.count(f"warning: {gpu_results.PADDED}: {lost}\n") == 2
    assert said.count(f"warning: simpo: ours and the padded step: {lost}\n") == 1
    # Before the padded side was run, all of the trainer's stood in the file.
    assert {"agreement", "head_tflops", "pairs_per_second_at_32_layers", "seconds_forward"} <= set(known[0])
    rows = read_rows(tmp_path / "gpu.csv")
    assert [row["method"] for row in rows] == [*VARIANTS, *VARIANTS]
    assert float(rows[0]["agreement"]) > 0
    assert not rows[4]["agreement"]


@pytest.mark.slow
def test_it_runs_from_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.bench_gpu", *SMALL, "--csv", str(tmp_path / "gpu.csv")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout.splitlines()[-1])
    assert (figures["benchmark"], figures["goals"]) == ("gpu", [])
    rows = figures["rows"]
    assert [row["method"] for row in rows] == [*VARIANTS, gpu_results.PADDED]
    first = rows[0]
    assert 0 < first["agreement"] < 0.1
    assert first["seconds_ends"] > 0
    full = seconds_at(32, measured_layers=3, seconds=first["seconds"], ends_seconds=first["seconds_ends"])
    assert first["pairs_per_second_at_32_layers"] == pytest.approx(7 / full)
    for row in rows[:-1]:
        assert all(row[f"seconds_{phase}"] > 0 for phase in gpu_results.PHASES)
        assert sum(row[f"seconds_{phase}"] for phase in gpu_results.PHASES) == pytest.approx(row["seconds"])
        assert all(row[f"seconds_{part}"] > 0 for part in PARTS[:-1])
        assert row["seconds_communication"] == 0
    assert [row["num_layers"] for row in read_rows(tmp_path / "gpu.csv")] == ["3"] * len(rows)
