"""``--dry-run`` of the trainer: all that a run needs, for machines that are not there, and nothing started."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_rmipo.training import main as trainer
from tests.integration.data import write_pairs
from tests.integration.test_training import flags

MACHINES = {"dry_run": True, "gpus": 16, "nodes": 4}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs")


def test_a_layout_that_fits(prefix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "global_batch_size": 12}
    # Flags that this machine has no device for are those of another.
    device = {"distributed_backend": "nccl", "record_memory_history": True}
    arguments = flags(prefix, tmp_path / "run", **MACHINES, **layout, **device)
    assert trainer.main(arguments) == 0
    shown = capsys.readouterr().out
    for words in ("16 H100 (4 nodes of 4, 80 GB", "layout   TP 2 x DP 8", "memory  ", "run      6 steps", "nothing was run"):
        assert words in shown
    assert not (tmp_path / "run").exists()
    assert not dist.is_initialized()


def test_a_layout_that_does_not_fit(prefix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trainer.main(flags(prefix, tmp_path / "run", **MACHINES, gpu_memory_gb=2.51, global_batch_size=16)) == 1
    ends = capsys.readouterr()
    assert "memory  " in ends.out
    assert "does not fit: " in ends.err
    assert "plan_layout.py" in ends.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tensor_model_parallel_size": 3}, ["--tensor-model-parallel-size 3", "would work"]),
        ({"seq_length": 50_000}, ["--seq-length 50000"]),
        ({"load_hf": "nowhere"}, ["nowhere"]),
        ({"gpus": 10}, ["10 GPUs", "4 nodes"]),
        ({"gpus": 0}, ["--gpus 0: must be at least 1"]),
        ({"dry_run": None}, ["--gpus does nothing without --dry-run", "--nodes does nothing"]),
    ],
)
def test_what_a_run_would_refuse(
    prefix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], words: list[str]
) -> None:
    assert trainer.main(flags(prefix, tmp_path / "run", **{**MACHINES, "global_batch_size": 16, **changes})) == 1
    said = capsys.readouterr().err
    assert not [word for word in words if word not in said]
