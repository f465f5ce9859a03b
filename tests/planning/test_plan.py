"""Layouts that are found, compared and told of."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from megatron_rmipo.config.flags.planning import PlanningConfig
from megatron_rmipo.config.pipeline_split import stage_shares
from megatron_rmipo.config.schema import Config, DataConfig, ModelConfig, TrainingConfig
from megatron_rmipo.data.batches.batch_builder import BatchBuilder
from megatron_rmipo.data.batches.spread import spread_evenly
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.families.architecture import ModelArchitecture
from megatron_rmipo.memory.standing import standing_memory
from megatron_rmipo.objectives.arguments import objective_of, parse_arguments
from megatron_rmipo.planning import cli, workload
from megatron_rmipo.planning.fit import rank_memory
from megatron_rmipo.planning.hardware import Cluster, read_cluster
from megatron_rmipo.planning.layouts import layouts, pack_sizes, problems
from megatron_rmipo.planning.lengths import PairLengths
from megatron_rmipo.planning.plan import Planner, make_plan, why_not
from megatron_rmipo.planning.report import command, describe_plan, layout_flags
from megatron_rmipo.planning.shapes import read_shape
from megatron_rmipo.planning.short_numbers import figure
from megatron_rmipo.planning.sizes import Sizes
from megatron_rmipo.planning.workload import Workloads

# Shallow, so that a test is quick; as wide as Llama-3-8B.
DENSE = dataclasses.replace(read_shape("llama3-8b"), num_layers=6)
SPARSE = dataclasses.replace(read_shape("qwen3-30b-a3b"), num_layers=6)
RNG = np.random.default_rng(5)
LENGTHS = PairLengths("made", RNG.integers(20, 400, size=(90, 3)), num_pairs=900)


def base(batch: int = 24, *flags: str) -> Config:
    config = parse_arguments(["--global-batch-size", str(batch), "--bf16", *flags])
    return dataclasses.replace(config, data=DataConfig(seq_length=800))


def planner(arch: ModelArchitecture, batch: int = 24, *flags: str) -> Planner:
    config = base(batch, *flags)
    return Planner(arch, config, Workloads(arch, objective_of(config).needs, LENGTHS))


def cluster(gpus: int = 16, **flags: object) -> Cluster:
    return read_cluster(PlanningConfig(**flags), gpus)  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_the_trainer_takes_every_layout(arch: ModelArchitecture) -> None:
    found = list(layouts(base(), arch, cluster(), least=1200))
    parallel = [one.parallel for one in found]
    assert {one.tensor_model_parallel_size for one in parallel} >= {1, 2, 4}
    assert {one.pipeline_model_parallel_size for one in parallel} >= {1, 2}
    assert {one.expert_model_parallel_size for one in parallel} == ({1, 2, 4, 8, 16} if arch.experts else {1})
    assert {one.model.recompute_granularity for one in found} == {None, "selective", "full"}
    for config in found[:: max(1, len(found) // 20)]:
        assert list(problems(config, arch, 16)) == []
        again = parse_arguments([*layout_flags(config), "--load-hf", "M", "--data-path", "D"])
        assert (again.parallel, again.model.recompute_granularity) == (config.parallel, config.model.recompute_granularity)


def test_long_rows_are_shared_by_context_parallel_ranks() -> None:
    short, long = (list(layouts(base(), DENSE, cluster(), least)) for least in (1000, 9000))
    assert {one.parallel.context_parallel_size for one in short} == {1}
    assert {one.parallel.context_parallel_size for one in long} >= {1, 2, 4, 8}
    for kind, recomputed in (("all_gather", {None, "full"}), ("a2a", {None, "selective", "full"})):
        shared = [one for one in long if one.parallel.context_parallel_size > 1 and one.parallel.cp_comm_type == kind]
        # Where keys are gathered, attention alone is computed anew without a flag.
        assert {one.model.recompute_granularity for one in shared} == recomputed


def test_the_output_layer_is_made_up_for_where_flags_can() -> None:
    """Six layers over two stages, an output layer as dear as two: the last one holds two; or, for memory, even ones."""
    found = {one.parallel for one in layouts(base(), DENSE, cluster(2), 1000, head=2.0)}
    splits = {stage_shares(6, one) for one in found if one.pipeline_model_parallel_size == 2}
    counts = {tuple(tuple(round(6 * share) for share in chunks) for chunks in stages) for stages in splits}
    assert counts == {((3,), (3,)), ((4,), (2,)), ((1, 2), (2, 1)), ((2, 2), (1, 1)), ((1, 1, 1), (1, 1, 1))}


def test_the_fastest_shapes_are_those_of_all_that_fit() -> None:
    one = planner(DENSE)
    fitting = [found for found in one.candidates(cluster(8)) if found.fits]
    every: dict[Sizes, float] = {}
    for found in fitting:
        seconds = one.estimate(found.config, found.cluster).seconds
        every[found.shape] = min(seconds, every.get(found.shape, seconds))
    for number in (1, 3):
        fastest = one.fastest(fitting, number)
        assert fastest[0].seconds == pytest.approx(min(every.values()))
        times = dict(reversed([(found.shape, found.seconds) for found in fastest]))
        assert sorted(times.values())[:number] == pytest.approx(sorted(every.values())[:number])
    assert len(one.fastest(fitting, 1)) < len(fitting)


def test_pairs_are_shared_out_once_for_each_number_of_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    shared_out: list[int] = []

    def spread(costs: np.ndarray, number: int) -> list[list[int]]:
        shared_out.append(number)
        return spread_evenly(costs, number)

    monkeypatch.setattr(workload, "spread_evenly", spread)
    list(planner(DENSE).candidates(cluster(8)))
    assert sorted(shared_out) == [1, 2, 4, 8]


def test_sizes_of_packs() -> None:
    assert pack_sizes(1200, 50_000, 1) == [1536, 2048, 4096, 8192, 16384]
    # A rank has 3,000 tokens of a step.
    assert pack_sizes(1200, 3000, 1) == [1536, 2048, 4096]
    assert pack_sizes(1200, 50_000, 4)[0] == 4096


def test_more_recomputation_is_looked_at_for_the_sake_of_fewer_packs() -> None:
    found: dict[object, list[tuple[bool, int]]] = {}
    for one in planner(DENSE).candidates(cluster(8, gpu_memory_gb=14.0)):
        found.setdefault(one.config.parallel, []).append((one.fits, one.load.num_packs))
    assert any(len(ways) > 1 for ways in found.values())
    for ways in found.values():
        fits, packs = zip(*ways, strict=True)
        assert all(fits) or fits == (False,)
        assert list(packs) == sorted(set(packs), reverse=True)


def test_a_workload_is_what_the_trainer_would_cut() -> None:
    one = planner(DENSE)
    load = one.loads.of(one.base, 3)
    batch = LENGTHS.batch(24)
    layout = dataclasses.replace(one.loads.layout(one.base, 3))
    flops, (passes,) = BatchBuilder(LENGTHS, layout).pass_costs(batch, [0])  # type: ignore[arg-type]
    assert load.flops == flops
    assert [one.layers.tolist() for one in load.passes] == [one.layers.tolist() for one in passes]
    # The responses alone, then the pairs with their prompts: each token once, but the last of each row.
    lengths = LENGTHS.lengths_of(batch)
    assert load.tokens == (lengths[:, 1:].sum() / 3, (lengths.sum() - 2 * 24) / 3)
    assert (load.num_pairs, load.num_packs) == (24, len(passes[-1].layers))


def test_other_objectives_have_other_passes() -> None:
    passes = {name: len(planner(DENSE, 24, "--objective", name).loads.of(base(), 2).passes) for name in ("sft", "rmipo", "kto")}
    assert passes == {"sft": 1, "rmipo": 2, "kto": 2}


def test_more_gpus_never_need_more_memory_of_a_rank() -> None:
    one = planner(DENSE)
    config = next(found for found in layouts(one.base, DENSE, cluster(4), 1200) if found.parallel.use_distributed_optimizer)
    peaks = [one.estimate(config, cluster(gpus)).memory.peak for gpus in (4, 8, 16)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > peaks[-1]


def test_the_best_layout_fits_and_is_fastest() -> None:
    plan = make_plan(planner(DENSE), cluster())
    assert plan.best.fits
    assert all(one.seconds >= plan.best.seconds / 1.01 for one in plan.others)
    assert all(one.sizes != plan.best.sizes for one in plan.others)
    assert sum(plan.best.step.parts.values()) == pytest.approx(plan.best.seconds)  # type: ignore[union-attr]
    for one in plan.others:
        assert "slower: +" in why_not(one, plan.best) or "as fast" in why_not(one, plan.best)


def test_too_little_memory_for_the_simplest() -> None:
    room = cluster(gpu_memory_gb=14.0)
    plan = make_plan(planner(DENSE), room)
    assert plan.best.memory.peak <= room.usable_bytes
    assert plan.too_large
    assert not any(one.fits for one in plan.too_large)
    assert why_not(plan.too_large[0], plan.best).startswith("does not fit: ")


def test_a_slow_network_moves_ranks_closer() -> None:
    """Over a hundredth of the bandwidth, a layout that sends less between nodes wins."""
    fast, slow = (make_plan(planner(SPARSE), cluster(interconnect=f"nvlink,{name}")).best for name in ("ib400", "eth10"))
    assert slow.seconds > fast.seconds
    assert slow.seconds <= planner(SPARSE).estimate(fast.config, slow.cluster).seconds


def test_a_model_that_fits_nowhere_says_how_many_gpus_would_do() -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(planner(DENSE), cluster(2, gpu_memory_gb=14.0))
    text = str(caught.value)
    assert "no layout fits on 2 H100" in text
    needed = int(text.split(" GPUs would do: --gpus ")[0].rsplit(" ", 1)[1])
    assert make_plan(planner(DENSE), cluster(needed, gpu_memory_gb=14.0)).best.fits
    with pytest.raises(ConfigError, match="no layout fits"):
        make_plan(planner(DENSE), cluster(needed // 2, gpu_memory_gb=14.0))


def test_what_the_trainer_takes_in_no_layout() -> None:
    config = dataclasses.replace(base(), data=DataConfig(seq_length=10_000))
    one = Planner(DENSE, config, Workloads(DENSE, objective_of(config).needs, LENGTHS))
    with pytest.raises(ConfigError, match=r"no layout of this model.*\n.*--seq-length 10000 is longer"):
        make_plan(one, cluster())


def test_the_command_is_one_that_the_trainer_takes() -> None:
    plan = make_plan(planner(DENSE), cluster(16, gpu_memory_gb=14.0))
    words = shlex.split(command(plan.best).replace("\\\n", " "))
    assert words[:5] == ["torchrun", "--nproc-per-node", "8", "--nnodes", "2"]
    again = parse_arguments(words[words.index("megatron_rmipo.train") + 1 :])
    assert again.parallel == plan.best.config.parallel
    assert again.data.tokens_per_microbatch == plan.best.config.data.tokens_per_microbatch
    assert max(map(len, describe_plan(plan, "t", 900).splitlines()[-5:])) <= 130


def test_the_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = json.loads((Path(cli.__file__).parent / "shapes.json").read_text())["llama3-8b"]
    (tmp_path / "config.json").write_text(json.dumps({**shape, "num_hidden_layers": 4}))
    arguments = ["--hf-model", str(tmp_path), "--lengths", "200,300,300", "--num-pairs", "1000", "--gpus", "8"]
    assert cli.main([*arguments, "--objective", "dpo", "--gpu", "a100", "--gpu-memory-gb", "40"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "dpo, --lengths 200,300,300: 1,000 pairs",
        "8 A100 (1 node of 8, 40 GB",
        "memory  ",
        "GPU-hours",
        "why not",
        "torchrun",
    ):
        assert words in shown
    assert cli.main([*arguments, "--nodes", "3"]) == 1
    assert "--gpus 6" in capsys.readouterr().err
    assert cli.main([*arguments, "--num-pairs", "0"]) == 1
    assert "--num-pairs 0" in capsys.readouterr().err


def test_an_adapter_needs_less_and_takes_less() -> None:
    whole, adapted = (planner(DENSE, 24, *flags).candidates(cluster(2)) for flags in ((), ("--lora-rank", "16")))
    before, after = ({found.config.parallel: found for found in some if found.fits} for some in (whole, adapted))
    assert before.keys() <= after.keys()
    for parallel in before:
        less, more = after[parallel].memory.standing, before[parallel].memory.standing
        assert less.total < more.total / 2
        assert less.weights == pytest.approx(more.weights, rel=0.03)
    one = planner(DENSE, 24, "--lora-rank", "16")
    best, full = make_plan(one, cluster(2)).best, make_plan(planner(DENSE), cluster(2)).best
    assert best.seconds < 0.8 * full.seconds
    # A backward is as dear as a forward, but that of attention and of the adapter; responses alone have none.
    ratio = best.load.flops / full.load.flops
    assert 2 / 3 < ratio < 3 / 4


def test_of_an_objective_that_mixes_logits_no_second_model_stands() -> None:
    flags = ("--objective", "epsilon_dpo")
    config, adapted = base(24, *flags), base(24, *flags, "--lora-rank", "16")
    found = [rank_memory(DENSE, one, 2, num_scored=400, num_packs=2, mixed=True).standing.reference for one in (config, adapted)]
    assert found == [standing_memory(DENSE, config, 2, 0).weights, 0.0]


def test_the_tool_takes_the_flags_of_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--hf-model", "llama3-8b", "--lengths", "300,200,200", "--gpus", "1", "--global-batch-size", "16", "--show", "1"]
    assert cli.main(asked) == 1
    assert "no layout fits" in capsys.readouterr().err
    flags = ["--lora-rank", "16", "--lora-target-modules", "q_proj", "v_proj", "--quantize-base", "nf4"]
    assert cli.main([*asked, *flags]) == 0
    told = capsys.readouterr().out
    assert "adapter of rank 16 over q_proj, v_proj: 6.82 M of 8.03 B numbers are trained (0.085 %)" in told
    assert "--lora-rank 16" in told
    assert "--lora-target-modules q_proj v_proj" in told
    for wrong, message in (
        (["--lora-rank", "0"], "--lora-rank 0: must be 1 or more"),
        (["--quantize-base", "int8"], "--quantize-base does nothing without --lora-rank"),
        (["--lora-rank", "4", "--lora-target-modules", "qkv"], "--lora-target-modules qkv matches no module"),
    ):
        assert cli.main([*asked, *wrong]) == 1
        assert message in capsys.readouterr().err


def test_numbers_are_short() -> None:
    assert [figure(number) for number in (1393.1, 71.92, 0.01234, 0.0)] == ["1,393", "71.9", "0.0123", "0"]


def test_flags_at_their_defaults_are_left_out() -> None:
    assert layout_flags(Config()) == []
    config = Config(model=ModelConfig(share_prompts=False), training=TrainingConfig(global_batch_size=3))
    assert layout_flags(config) == ["--no-share-prompts", "--global-batch-size", "3"]
