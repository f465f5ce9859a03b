"""Errors that memory ran out, explained: of each kind of pack, of the update, and on the ranks that fail later."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rmipo.config import CheckpointConfig, Config, DataConfig
from megatron_rmipo.data.batching import CostModel
from megatron_rmipo.data.collection import PairCollection
from megatron_rmipo.data.loader import BatchBuilder, BatchLayout, RankBatch
from megatron_rmipo.errors import OutOfMemoryError
from megatron_rmipo.model.architecture import ModelArchitecture
from megatron_rmipo.training import out_of_memory
from megatron_rmipo.training.memory_message import first_line, further_lines
from megatron_rmipo.training.memory_readings import PackOutOfMemory
from megatron_rmipo.training.out_of_memory import MemoryReport
from tests.integration.problem import collection, make_pairs

ARCH = ModelArchitecture("llama", 3, 64, 168, 4, 2, 16, 83, 4096, 1e4, 1e-5)
CONFIG = Config(data=DataConfig(tokens_per_microbatch=90, seq_length=30))
MESSAGE = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.15 GiB."


@pytest.fixture
def pairs() -> PairCollection:
    made = collection(make_pairs())
    made.match_anew()
    return made


@pytest.fixture
def builder(pairs: PairCollection) -> BatchBuilder:
    return BatchBuilder(pairs, BatchLayout(0, 1, 90, CostModel(1.0, 0.0, 0.0), unconditional="bos", bos_token_id=1))


@pytest.fixture
def batch(builder: BatchBuilder) -> RankBatch:
    return builder.build(np.array([4, 20, 9, 2, 17, 6, 1, 12, 15, 22]))


def report(directory: Path | None, config: Config = CONFIG, **groups: int) -> MemoryReport:
    ranks: Any = SimpleNamespace(**{"rank": 3, "dp_size": 2, "pp_size": 1, "pp_rank": 0, **groups})
    return MemoryReport(config, ARCH, ranks, directory)


def explained(report: MemoryReport, builder: BatchBuilder, batch: RankBatch, error: RuntimeError, optimizer: Any = None) -> str:
    """The message of the error that comes out."""
    cause = torch.OutOfMemoryError(MESSAGE) if isinstance(error, PackOutOfMemory) else None
    with pytest.raises(OutOfMemoryError) as caught, report.explaining("step 8", builder, batch, optimizer):
        raise error from cause
    assert caught.value.__cause__ is error
    return str(caught.value)


def failed(name: str, rows: Any, number: int, *, backward: bool = False) -> PackOutOfMemory:
    return PackOutOfMemory(name, rows, number, backward=backward, forward_done=backward, mixed=False)


def record_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "out_of_memory" / "rank3.json").read_text())
    return found


@pytest.mark.parametrize("kind", ["conditional", "unconditional", "mismatched"])
def test_a_pack_is_described_by_its_pairs(
    kind: str, builder: BatchBuilder, batch: RankBatch, pairs: PairCollection, tmp_path: Path
) -> None:
    rows = getattr(batch, kind)
    number = len(rows) - 1
    row = rows[number]
    message = explained(report(tmp_path), builder, batch, failed(f"{kind} pass", rows, number, backward=kind == "conditional"))
    pack = record_of(tmp_path)["pack"]
    assert (pack["number"], pack["of"], pack["tokens"], pack["scored_tokens"]) == (
        number + 1,
        len(rows),
        row.num_tokens,
        row.num_scored,
    )
    indices = sorted({int(batch.pair_indices[pair]) for pair in row.pair_numbers.tolist()})
    assert sorted(pair["pair"] for pair in pack["pairs"]) == sorted(f"pair {index} of memory" for index in indices)
    assert sum(pair["tokens"] for pair in pack["pairs"]) == row.num_tokens
    where = "backward" if kind == "conditional" else "forward"
    assert message.startswith(
        f"step 8: out of memory in the {where} of the {kind} pass, pack {number + 1} of {len(rows)} of this"
    )
    assert f"torch: {MESSAGE}\n  asked for 20.0 MiB; " in message
    assert f"all of it: {tmp_path / 'out_of_memory' / 'rank3.json'}" in message
    assert len(message.splitlines()) < 15


def test_other_errors_pass(builder: BatchBuilder, batch: RankBatch, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), report(tmp_path).explaining("step 8", builder, batch):
        raise RuntimeError("shapes differ")
    assert list(tmp_path.iterdir()) == []


def test_a_filler_names_no_pair(builder: BatchBuilder, tmp_path: Path) -> None:
    layout = dataclasses.replace(builder.layout, dp_rank=1, dp_size=2)
    batch = BatchBuilder(builder.pairs, layout).build(np.array([5]))
    message = explained(report(tmp_path), builder, batch, failed("gradient pass", batch.conditional, 0, backward=True))
    assert ", 0 pairs.\n" in message


def test_the_update_is_told_from_the_passes(builder: BatchBuilder, batch: RankBatch, tmp_path: Path) -> None:
    message = explained(report(tmp_path), builder, batch, torch.OutOfMemoryError(MESSAGE))
    assert message.startswith("step 8: out of memory outside the passes, where weights and optimizer state are updated.\n")
    assert "would leave more, each line by itself:\n    --use-distributed-optimizer (" in message
    assert "pack" not in record_of(tmp_path)


def test_room_is_left_for_the_optimizer_state_that_is_to_come(
    builder: BatchBuilder, batch: RankBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(out_of_memory, "free_bytes", lambda: 10_000_000)
    error = failed("gradient pass", batch.conditional, 0, backward=True)
    free = {}
    for name, state in (("none", {}), ("filled", {"weight": 1})):
        optimizer = SimpleNamespace(optimizer=SimpleNamespace(state=state))
        explained(report(tmp_path), builder, batch, error, optimizer)
        free[name] = record_of(tmp_path)["memory"]["free_without_the_pack"]
    # Two moments in fp32 for each weight: three layers, and two tables of 128 rows (83 tokens, padded).
    layer = 64 * (64 + 2 * 32 + 64 + 3 * 168) + 2 * 64
    assert free == {"none": 10_000_000 - 8 * (3 * layer + 2 * 128 * 64), "filled": 10_000_000}


def test_stages_before_the_last_hold_several_packs(builder: BatchBuilder, batch: RankBatch, tmp_path: Path) -> None:
    assert len(batch.conditional) > 2
    estimates = []
    for stage in (0, 2):
        error = failed("gradient pass", batch.conditional, 0, backward=True)
        message = explained(report(tmp_path, pp_size=3, pp_rank=stage), builder, batch, error)
        estimates.append(record_of(tmp_path)["estimate"]["activations"])
        assert ("of 3 packs at a time" in message) == (stage == 0)
    assert estimates[0] == 3 * estimates[1]


def test_advice_knows_the_capacity_of_the_packs_and_the_largest_pair(
    builder: BatchBuilder, batch: RankBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(out_of_memory, "suggestions", lambda arch, config, *others: asked.append(others) or [])
    monkeypatch.setattr(out_of_memory, "free_bytes", lambda: 77)
    for name, rows, backward in (("gradient", batch.conditional, True), ("unconditional", batch.unconditional, False)):
        explained(report(None), builder, batch, failed(f"{name} pass", rows, 0, backward=backward))
    largest = max(pair.prompt.size + pair.chosen.size - 1 + pair.rejected.size - 1 for pair in make_pairs())
    assert largest > CONFIG.data.seq_length
    assert [(dp_size, least) for dp_size, _, least in asked] == [(2, largest)] * 2
    shortages = [shortage for _, shortage, _ in asked]
    assert [(one.capacity_factor, one.backward, one.free_bytes) for one in shortages] == [(1, True, 77), (2, False, 77)]


def test_a_rank_that_fails_later_says_no_more_than_where(
    builder: BatchBuilder, batch: RankBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(out_of_memory, "claim_first_failure", lambda text: bool(told.append(text)))
    message = explained(report(tmp_path), builder, batch, failed("gradient pass", batch.conditional, 0, backward=True))
    assert told == ["rank 3 ran out of memory"]
    assert len(message.splitlines()) == 1
    assert message.endswith("Another rank told of its own before, and what would help.")
    assert record_of(tmp_path)["pack"]["number"] == 1, "its file is written all the same"


def test_a_file_that_cannot_be_written_hides_nothing(builder: BatchBuilder, batch: RankBatch, tmp_path: Path) -> None:
    (tmp_path / "out_of_memory").write_text("a file")
    message = explained(report(tmp_path), builder, batch, failed("gradient pass", batch.conditional, 0, backward=True))
    assert f"{tmp_path / 'out_of_memory' / 'rank3.json'}: cannot be written: " in message
    nowhere = explained(report(None), builder, batch, failed("gradient pass", batch.conditional, 0, backward=True))
    assert "json" not in nowhere
    saved = dataclasses.replace(CONFIG, checkpoint=CheckpointConfig(save=str(tmp_path / "run")))
    assert explained(report(None, saved), builder, batch, torch.OutOfMemoryError("x")).endswith("no checkpoint was saved yet")


def test_memory_that_is_in_pieces_is_told() -> None:
    gib = 2**30
    memory = {"asked": 2 * gib, "in_use": 60 * gib, "reserved": 70 * gib, "free": gib // 2, "total": 80 * gib}
    record: dict[str, Any] = {
        "when": "step 2",
        "error": "CUDA out of memory.",
        "memory": {**memory, "free_without_the_pack": 30 * gib},
        "standing": {"weights": 16.0 * gib},
        "suggestions": [],
    }
    lines = further_lines(record)
    assert first_line(record).startswith("step 2: out of memory outside the passes")
    assert lines[1] == (
        "asked for 2.00 GiB; 60.00 GiB in use by tensors; 70.00 GiB reserved by torch; 512.0 MiB free; 80.00 GiB in all; "
        "30.00 GiB free without the pack"
    )
    assert lines[2].startswith("10.00 GiB are reserved in pieces that are too small: PYTORCH_CUDA_ALLOC_CONF=")
    assert lines[-1].startswith("by the estimate nothing fits on these ranks")
    record["memory"]["reserved"] = 61 * gib
    assert not any("pieces" in line for line in further_lines(record))
