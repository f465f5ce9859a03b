"""Errors that memory ran out, explained: of each kind of pack, of the update, and on the ranks that fail later."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rmipo.checkpoint import source
from megatron_rmipo.config.flags.parallel import ParallelConfig
from megatron_rmipo.config.schema import CheckpointConfig, Config, DataConfig, ModelConfig
from megatron_rmipo.data.batches.batch_builder import BatchBuilder, RankBatch
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.sizes import CostModel
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.errors import OutOfMemoryError
from megatron_rmipo.families.architecture import ModelArchitecture, Rope
from megatron_rmipo.memory import report as out_of_memory
from megatron_rmipo.memory.message import first_line, further_lines
from megatron_rmipo.memory.readings import MemoryReading, PackOutOfMemory
from megatron_rmipo.memory.report import MemoryReport
from tests.integration.problem import collection, make_pairs

ARCH = ModelArchitecture("llama", 3, 64, 168, 4, 2, 16, 83, 4096, (Rope(1e4),), 1e-5)
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


def report(directory: Path | None, config: Config = CONFIG, largest_pair: int = 70, **groups: int) -> MemoryReport:
    ranks: Any = SimpleNamespace(**{"rank": 3, "world_size": 2, "pp_size": 1, "pp_rank": 0, **groups})
    latest = partial(source.checkpoint_to_go_on_from, config.checkpoint)
    return MemoryReport(config, ARCH, ranks, directory, lambda: largest_pair, latest)


def explained(
    report: MemoryReport,
    builder: BatchBuilder,
    batch: RankBatch,
    error: RuntimeError,
    optimizer: Any = None,
    *,
    trains: bool = True,
) -> str:
    """The message of the error that comes out."""
    cause = torch.OutOfMemoryError(MESSAGE) if isinstance(error, PackOutOfMemory) else None
    with pytest.raises(OutOfMemoryError) as caught, report.explaining("step 8", builder, batch, optimizer, trains=trains):
        raise error from cause
    assert caught.value.__cause__ is error
    return str(caught.value)


def failed(name: str, rows: Any, number: int, *, backward: bool = False) -> PackOutOfMemory:
    return PackOutOfMemory(name, rows, number, backward=backward, in_backward=backward, mixed=False)


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
    assert message.startswith("step 8: out of memory outside the passes over packs.\n")
    assert "would leave more, each line by itself:\n    --use-distributed-optimizer (" in message
    assert "pack" not in record_of(tmp_path)


def test_what_comes_before_the_first_batch_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutOfMemoryError) as caught, report(tmp_path).explaining("loading the model"):
        raise torch.OutOfMemoryError(MESSAGE)
    message = str(caught.value)
    assert message.startswith("loading the model: out of memory.\n")
    assert "would leave more, each line by itself:\n    --use-distributed-optimizer (" in message
    assert message.endswith("no checkpoint was saved yet")
    # An error that was explained on the way is left as it is.
    with pytest.raises(OutOfMemoryError) as again, report(tmp_path).explaining("loading the model"):
        raise caught.value
    assert again.value is caught.value


def test_where_nothing_trains_there_are_weights_alone(builder: BatchBuilder, batch: RankBatch, tmp_path: Path) -> None:
    for error in (failed("scoring pass", batch.conditional, 0), torch.OutOfMemoryError(MESSAGE)):
        message = explained(report(tmp_path), builder, batch, error, trains=False)
        standing = record_of(tmp_path)["standing"]
        assert standing.pop("weights") > 0
        assert not any(standing.values())
        assert not any(word in message for word in ("gradients", "moments", "optimizer"))
        assert message.endswith("what was scored is kept: start again")


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is taken to hold a run's checkpoint of step 7."""
    monkeypatch.setattr(source, "latest_complete_iteration", lambda path: 7 if path == tmp_path / "run" else None)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("flags", "goes_on"),
    [
        ({"save": "run"}, "go on with --load {}"),
        ({"save": "run", "no_save_optim": True}, "go on with --load {} --no-load-optim"),
        ({"save": "new", "load": "run"}, "go on with --load {}"),
        ({"save": "new", "load": "run", "finetune": True}, "no checkpoint was saved yet"),
    ],
)
def test_what_a_checkpoint_refuses_is_not_said(
    flags: dict[str, Any], goes_on: str, saved: Path, builder: BatchBuilder, batch: RankBatch, tmp_path: Path
) -> None:
    named = {name: str(tmp_path / value) if isinstance(value, str) else value for name, value in flags.items()}
    config = dataclasses.replace(CONFIG, checkpoint=CheckpointConfig(**named))
    message = explained(report(tmp_path, config), builder, batch, torch.OutOfMemoryError(MESSAGE))
    assert message.endswith(goes_on.format(saved))
    resumes = goes_on.startswith("go on")
    assert ("--use-distributed-optimizer --no-load-optim (" in message) == resumes
    assert ("--use-distributed-optimizer (" in message) == (not resumes)


def test_a_snapshot_is_named_where_it_was_written(builder: BatchBuilder, batch: RankBatch, tmp_path: Path) -> None:
    for written in (True, False):
        made = report(tmp_path)
        made._witness.reading, made._witness.snapshot_written = MemoryReading(asked=5), written
        message = explained(made, builder, batch, torch.OutOfMemoryError(MESSAGE))
        assert ("; memory snapshot beside it, for pytorch.org/memory_viz: rank3.pickle" in message) == written
        assert record_of(tmp_path)["memory"]["asked"] == 5


@pytest.mark.parametrize("bf16", [False, True])
def test_room_is_left_for_the_moments_that_are_to_come(
    bf16: bool, builder: BatchBuilder, batch: RankBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(out_of_memory, "free_bytes", lambda: 10_000_000)
    error = failed("gradient pass", batch.conditional, 0, backward=True)
    config = dataclasses.replace(CONFIG, model=ModelConfig(bf16=bf16))
    free = {}
    for name, state in (("none", {}), ("filled", {"weight": 1})):
        optimizer = SimpleNamespace(optimizer=SimpleNamespace(state=state))
        explained(report(tmp_path, config), builder, batch, error, optimizer)
        free[name] = record_of(tmp_path)["memory"]["free_without_the_pack"]
    # Two moments in fp32 for each weight, whatever its dtype: three layers, two tables of 128 rows (83 tokens, padded), a norm.
    layer = 64 * (64 + 2 * 32 + 64 + 3 * 168) + 2 * 64
    assert free == {"none": 10_000_000 - 8 * (3 * layer + 2 * 128 * 64 + 64), "filled": 10_000_000}


def test_stages_before_the_last_hold_several_packs(builder: BatchBuilder, batch: RankBatch, tmp_path: Path) -> None:
    assert len(batch.conditional) > 2
    estimates = []
    for stage in (0, 2):
        error = failed("gradient pass", batch.conditional, 0, backward=True)
        config = dataclasses.replace(CONFIG, parallel=ParallelConfig(pipeline_model_parallel_size=3))
        message = explained(report(tmp_path, config, pp_size=3, pp_rank=stage, world_size=6), builder, batch, error)
        estimates.append(record_of(tmp_path)["estimate"]["activations"])
        assert (record_of(tmp_path)["estimate"]["head"] > 0) == (stage == 2)
        assert ("of 3 packs at a time" in message) == (stage == 0)
    # What goes on to the next stage is kept, too.
    tokens = batch.conditional[0].num_tokens
    assert estimates[0] == 3 * (estimates[1] + tokens * 64 * 4)


def test_advice_knows_the_capacity_of_the_packs_and_the_largest_pair(
    builder: BatchBuilder, batch: RankBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(out_of_memory, "suggestions", lambda arch, config, *others: asked.append(others) or [])
    monkeypatch.setattr(out_of_memory, "free_bytes", lambda: 77)
    for name, rows, backward in (("gradient", batch.conditional, True), ("unconditional", batch.unconditional, False)):
        for largest_pair in (70, 20):
            made = report(None, largest_pair=largest_pair)
            explained(made, builder, batch, failed(f"{name} pass", rows, 0, backward=backward))
    # Packs smaller than a sequence would be refused, too.
    assert [(dp_size, least) for dp_size, _, least in asked] == [(2, 70), (2, CONFIG.data.seq_length)] * 2
    shortages = [shortage for _, shortage, _ in asked]
    assert [(one.capacity_factor, one.backward, one.free_bytes) for one in shortages[::2]] == [(1, True, 77), (2, False, 77)]


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
        "standing": {"weights": 16.0 * gib, "master_weights": 2.0 * gib, "moments": 0.0},
        "has_packs": True,
        "suggestions": [],
    }
    lines = further_lines(record)
    assert first_line(record) == "step 2: out of memory outside the passes over packs."
    assert "estimate of what stands: weights 16.00 GiB, master weights 2.00 GiB" in lines
    assert lines[1] == (
        "asked for 2.00 GiB; 60.00 GiB in use by tensors; 70.00 GiB reserved by torch; 512.0 MiB free; 80.00 GiB in all; "
        "30.00 GiB free afterwards"
    )
    assert lines[2].startswith("10.00 GiB are reserved in pieces that are too small: PYTORCH_CUDA_ALLOC_CONF=")
    assert lines[-1].startswith("by the estimate nothing fits on these ranks")
    record["memory"]["reserved"] = 61 * gib
    assert not any("pieces" in line for line in further_lines(record))
