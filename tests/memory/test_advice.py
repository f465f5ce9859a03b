"""Flags that would have fitted: each suggestion is put to the estimate, and the next larger pack is not."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_rmipo.config.flags.lora import LoraConfig
from megatron_rmipo.config.flags.memory import MemoryConfig
from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.schema import Config, DataConfig, ModelConfig
from megatron_rmipo.families.architecture import Experts, ModelArchitecture, Rope
from megatron_rmipo.memory import advice
from megatron_rmipo.memory.advice import USABLE_SHARE, Shortage, suggestions, update_suggestions
from megatron_rmipo.memory.estimate import pack_memory
from megatron_rmipo.memory.pack import PackSize
from megatron_rmipo.memory.standing import standing_memory

ARCH = ModelArchitecture("llama", 32, 4096, 14336, 32, 8, 128, 128256, 8192, (Rope(5e5),), 1e-5)
PACK = PackSize(num_tokens=7900, num_scored=3950)
GIB = 2**30
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


@pytest.fixture(autouse=True)
def no_later_resorts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has nothing to keep the optimizer's state otherwise with."""

    def problems(flags: Config) -> Iterator[str]:
        if flags.memory != MemoryConfig():
            yield "not here"

    monkeypatch.setattr(advice, "machine_problems", problems)


def config(*, model: dict[str, Any] | None = None, parallel: dict[str, Any] | None = None) -> Config:
    return Config(
        data=DataConfig(tokens_per_microbatch=8192),
        model=ModelConfig(bf16=True, **(model or {})),
        parallel=ParallelConfig(tensor_model_parallel_size=2, **(parallel or {})),
    )


def shortage(free_gib: float, *, backward: bool = True, capacity_factor: int = 1, pack: PackSize = PACK, **more: Any) -> Shortage:
    return Shortage(pack, backward, capacity_factor, free_gib * GIB, {"fused": True}, **more)


def peak(flags: Config, tokens: int) -> float:
    return pack_memory(ARCH, flags, PackSize(tokens, tokens // 2), backward=True, fused=True).peak


def tokens_of(line: str) -> int:
    found = re.search(r"--tokens-per-microbatch (\d+)", line)
    assert found is not None, line
    return int(found[1])


def test_the_largest_pack_that_fits_is_found() -> None:
    flags = config()
    needed = peak(flags, 7900) / GIB
    lines = suggestions(ARCH, flags, 8, shortage(0.6 * needed), least_tokens=2048)
    tokens = tokens_of(lines[0])
    assert lines[0] == f"--tokens-per-microbatch {tokens}"
    assert tokens % 64 == 0
    usable = USABLE_SHARE * 0.6 * needed * GIB
    assert peak(flags, tokens) <= usable < peak(flags, tokens + 64)
    # A pack is about as large as its part of what is free allows.
    assert tokens == pytest.approx(0.57 * 7900, rel=0.05)


def test_an_estimate_that_was_too_low_is_raised_to_what_did_not_fit() -> None:
    flags = config()
    lines = suggestions(ARCH, flags, 8, shortage(3 * peak(flags, 7900) / GIB), least_tokens=2048)
    assert tokens_of(lines[0]) == pytest.approx(USABLE_SHARE * 7900, rel=0.02)
    # All that reaches the packs as they were is named, and what hardly changes them is not.
    assert FULL in lines
    assert not any("chunk" in line for line in lines)


def test_where_no_pair_fits_other_flags_are_named_and_those_that_do_not_help_enough_are_not() -> None:
    flags = config(parallel={"use_distributed_optimizer": True})
    full = dataclasses.replace(
        flags, model=ModelConfig(bf16=True, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    )
    free = 1.3 * peak(full, 8192) / GIB
    assert free * GIB < peak(flags, 4096)
    lines = suggestions(ARCH, flags, 2, shortage(free), least_tokens=4096)
    assert lines[0] == FULL
    assert not any(line.startswith("--tokens-per-microbatch") or "selective" in line for line in lines)
    # What stands is what does not fit.
    assert suggestions(ARCH, flags, 2, shortage(0.01), least_tokens=4096) == ["--lora-rank 16"]
    adapter = dataclasses.replace(flags, lora=LoraConfig(lora_rank=8))
    assert suggestions(ARCH, adapter, 2, shortage(0.01), least_tokens=4096) == []


def test_what_a_measure_frees_beside_the_pack_counts() -> None:
    flags = config()
    sharded = dataclasses.replace(flags, parallel=ParallelConfig(tensor_model_parallel_size=2, use_distributed_optimizer=True))
    freed = standing_memory(ARCH, flags, 16, 0).total - standing_memory(ARCH, sharded, 16, 0).total
    assert freed == pytest.approx(12 * 8.03e9 / 2 * 7 / 8, rel=0.01)
    lack = shortage((1.06 * peak(flags, 8192) - freed) / GIB)
    assert suggestions(ARCH, flags, 16, lack, least_tokens=8000)[0] == "--use-distributed-optimizer"
    # There is nothing to shard over with one data-parallel rank.
    assert not any("distributed" in line for line in suggestions(ARCH, flags, 2, lack, least_tokens=8000))


def test_an_optimizer_that_is_not_there_is_not_sharded_and_one_that_was_saved_is_started_anew() -> None:
    flags = config()
    sharded = dataclasses.replace(flags, parallel=ParallelConfig(tensor_model_parallel_size=2, use_distributed_optimizer=True))
    freed = standing_memory(ARCH, flags, 16, 0).total - standing_memory(ARCH, sharded, 16, 0).total
    free = (1.06 * peak(flags, 8192) - freed) / GIB
    lines = suggestions(ARCH, flags, 16, shortage(free, optimizer="saved"), least_tokens=8000)
    assert "--use-distributed-optimizer --no-load-optim" in lines
    assert "--use-distributed-optimizer" not in lines


def test_where_nothing_trains_weights_alone_stand() -> None:
    flags, weights = config(model={"logprob_chunk_size": 1024}), 2 * 8.03e9 / 2 / GIB
    lines = update_suggestions(ARCH, flags, 8, optimizer="none")
    assert [line.partition(" (")[0] for line in lines] == ["--tensor-model-parallel-size 4 --sequence-parallel"]
    assert [float(number) for number in re.findall(r"[\d.]+(?= of| GiB)", lines[0])] == pytest.approx(
        [weights / 2, weights], abs=0.01
    )
    # Half of the weights are less than what lacks; with half of gradients and optimizer it would be enough.
    pack = PackSize(40 * 8192, 40 * 8192)
    divided = dataclasses.replace(flags, parallel=ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True))
    free = pack_memory(ARCH, divided, pack, backward=False, fused=True).peak / GIB - weights
    for optimizer, lines in (("unsaved", ["--tensor-model-parallel-size 4 --sequence-parallel"]), ("none", [])):
        lack = shortage(free, backward=False, pack=pack, capacity_factor=40, optimizer=optimizer)
        found = suggestions(ARCH, flags, 8, lack, least_tokens=8192)
        assert [line for line in found if line.endswith("--sequence-parallel")] == lines


def test_a_stage_without_the_output_layer_is_not_told_of_it() -> None:
    flags = config(parallel={"pipeline_model_parallel_size": 2})
    for last_stage in (True, False):
        kind: dict[str, Any] = {"fused": True, "stage": int(last_stage)}
        free = 0.7 * pack_memory(ARCH, flags, PACK, backward=True, **kind).peak / GIB
        lack = dataclasses.replace(shortage(free), kind=kind)
        lines = suggestions(ARCH, flags, 4, lack, least_tokens=8192)
        assert lines
        assert any("chunk" in line for line in lines) == last_stage, lines


def test_a_larger_tensor_parallel_size_divides_the_model_and_the_ranks() -> None:
    flags = config(model={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1})
    flags = dataclasses.replace(flags, parallel=dataclasses.replace(flags.parallel, use_distributed_optimizer=True))

    def sizes(dp_size: int) -> set[str]:
        lines = suggestions(ARCH, flags, 2 * dp_size, shortage(0.7 * peak(flags, 7900) / GIB), least_tokens=8192)
        return {line.split()[1] for line in lines if line.startswith("--tensor-model-parallel-size")}

    # 2 x 4 ranks could be 4 x 2; of 2 x 3 none but 2 divides the model's 8 key/value heads.
    assert (sizes(4), sizes(3), sizes(1)) == ({"4"}, set(), set())


def test_a_tensor_parallel_size_that_fp8_cannot_take_is_not_named() -> None:
    # A quarter of its MLP is no multiple of 16, half of it is.
    arch = dataclasses.replace(ARCH, ffn_hidden_size=32 * 449)
    for fp8_format, named in ((None, True), ("hybrid", False)):
        lines = update_suggestions(arch, config(model={"fp8_format": fp8_format}), 8)
        assert any("tensor" in line for line in lines) == named


def test_packs_of_the_unconditional_pass_hold_twice_as_many_and_keep_nothing() -> None:
    pack = PackSize(num_tokens=16000, num_scored=16000)
    flags = config(model={"logprob_chunk_size": 1024})
    alone = pack_memory(ARCH, flags, pack, backward=False, fused=True).peak
    lack = shortage(0.5 * alone / GIB, backward=False, capacity_factor=2, pack=pack)
    lines = suggestions(ARCH, flags, 2, lack, least_tokens=2048)
    assert tokens_of(lines[0]) == pytest.approx(0.5 * USABLE_SHARE * 8000, rel=0.05)
    assert not any("recompute" in line for line in lines)


def test_for_the_update_what_stands_is_made_smaller() -> None:
    lines = update_suggestions(ARCH, config(), 8)
    assert [line.partition(" (")[0] for line in lines] == [
        "--use-distributed-optimizer",
        "--tensor-model-parallel-size 4 --sequence-parallel",
        "--lora-rank 16",
    ]
    # Of 18 bytes a parameter, half of the parameters on a rank: 12 of 18 are shared by 4 ranks.
    assert [float(number) for number in re.findall(r"[\d.]+(?= of| GiB)", lines[0])] == pytest.approx(
        [9 * 8.03e9 / 2 / GIB, 18 * 8.03e9 / 2 / GIB], abs=0.02
    )
    sharded = config(parallel={"use_distributed_optimizer": True})
    # Nothing is left but to train less: weights in two bytes, 16 for each of the adapter's numbers, of half the model.
    (line,) = update_suggestions(ARCH, sharded, 2)
    left = standing_memory(ARCH, dataclasses.replace(sharded, lora=LoraConfig(lora_rank=16)), 2, 0).total / GIB
    assert line.startswith("--lora-rank 16 (")
    assert float(line.partition("(")[2].partition(" ")[0]) == pytest.approx(left, abs=0.01)
    # Not where a checkpoint holds weights that it would not go on with, nor of experts that can have none.
    assert update_suggestions(ARCH, sharded, 2, optimizer="saved") == []
    stacked = dataclasses.replace(ARCH, family="gpt_oss", experts=Experts(6, 2, 14336))
    assert not any("lora" in line for line in update_suggestions(stacked, sharded, 2))


def test_experts_are_spread_further_where_ranks_allow() -> None:
    sparse = dataclasses.replace(ARCH, family="mixtral", experts=Experts(6, 2, 14336))
    flags = config(parallel={"expert_model_parallel_size": 2, "use_distributed_optimizer": True})
    # Of 24 ranks; experts are cut in two, as tensor parallelism cuts the rest.
    lines = update_suggestions(sparse, flags, 24)
    assert any(line.startswith("--expert-model-parallel-size 3 (") for line in lines), lines
    assert not any("expert" in line for line in update_suggestions(sparse, flags, 8)), "neither 3 x 2 nor 6 x 2 divides 8"


def test_later_resorts_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("config_problems", "machine_problems", "layout_problems"):
        monkeypatch.setattr(advice, name, lambda *_: iter(()))
    flags = config(parallel={"use_distributed_optimizer": True})
    lines = update_suggestions(ARCH, flags, 2)
    precise = "--use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16"
    assert [line.partition(" (")[0] for line in lines] == [
        precise,
        "--use-precision-aware-optimizer --optimizer-cpu-offload",
        "--lora-rank 16",
    ]
    # Of 18 bytes a parameter 12 are the optimizer's, and 6 of these are left; or none.
    share = 8.03e9 / 2 / GIB
    for line, left in zip(lines[:2], (12, 6), strict=True):
        assert [float(number) for number in re.findall(r"[\d.]+(?= of| GiB)", line)] == pytest.approx(
            [left * share, 18 * share], abs=0.02
        )
    assert update_suggestions(ARCH, flags, 2, optimizer="saved") == lines[:2]
    assert update_suggestions(ARCH, flags, 2, optimizer="none") == []


def test_context_parallelism_is_named_for_packs_alone() -> None:
    flags = config(model={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1})
    flags = dataclasses.replace(flags, parallel=dataclasses.replace(flags.parallel, use_distributed_optimizer=True))
    free = 0.6 * peak(flags, 8192) / GIB
    lines = suggestions(ARCH, flags, 6, shortage(free), least_tokens=8192)
    # Three data-parallel ranks cannot become a larger tensor-parallel group of this model.
    assert "--context-parallel-size 3" in lines
    assert not any("context" in line for line in update_suggestions(ARCH, flags, 6))
