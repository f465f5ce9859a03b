"""Files of a Hugging Face directory that several ranks write together."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_rmipo.checkpoint.hf import shared_writing
from megatron_rmipo.checkpoint.hf.gathering import Seat
from megatron_rmipo.checkpoint.hf.output_files import FileWriter
from megatron_rmipo.checkpoint.hf.shared_writing import share_files, steps_of
from megatron_rmipo.checkpoint.hf.weights import export_hf, load_hf_weights
from megatron_rmipo.checkpoint.hf.writer import plan_model_files
from megatron_rmipo.errors import ConversionError
from megatron_rmipo.families.hf_config import read_architecture
from megatron_rmipo.families.tensors import rules_of, stored_tensors, tensors_of
from megatron_rmipo.model.build import build_policy
from megatron_rmipo.model.megatron_config import transformer_config
from megatron_rmipo.runtime.groups import initialize_runtime, shutdown_runtime
from megatron_rmipo.runtime.signals import RunStopped, StopRequest
from tests.checkpoint.models import write_hf_model
from tests.harness import run_distributed

MAX_SHARD_BYTES = 40000


def test_files_are_of_one_stage_and_written_by_all_replicas_side_by_side(tmp_path: Path) -> None:
    arch = read_architecture(write_hf_model(tmp_path / "hf", "mixtral"))
    dtypes = {rule.megatron: torch.float32 for rule in rules_of(arch)}
    stages = {(rule.megatron, place): int((place.layer or 0) >= 2) for rule, place in tensors_of(arch)}
    files = plan_model_files(arch, dtypes, MAX_SHARD_BYTES, stages)
    assert [tensor.name for file in files for tensor in file.plan.tensors] == list(stored_tensors(arch))
    assert all(len({tensor.stage for tensor in file.plan.tensors}) == 1 for file in files)
    shares = share_files(files, 0, num_replicas=3, tp_size=2)
    assert [share.writer for share in shares[:7]] == [*(Seat(dp, tp) for tp in range(2) for dp in range(3)), Seat(0, 0)]
    assert [share.turn for share in shares[:7]] == [0] * 6 + [1]
    # Every part once; of each file in its order, and those of a turn in turns.
    steps = list(steps_of(shares))
    for share in shares:
        assert [part for its, part, _ in steps if its is share] == list(share.file.parts)
    assert [share.writer for share, _, _ in steps[:6]] == [share.writer for share in shares[:6]]
    assert next(number for number, (share, _, is_last) in enumerate(steps) if share.turn == 1 and not is_last) > 6


def export(hf: Path, out: Path) -> dict[str, Any]:
    """At TP 2 x DP 2: the files that this rank wrote; what it is told where rank 3 cannot write; where rank 2 gets a signal."""
    groups = initialize_runtime(2)
    arch = read_architecture(hf)
    model = build_policy(arch, transformer_config(arch, groups), groups)
    load_hf_weights(model, hf, arch, groups=groups)
    given: Any = {"dtype": None, "groups": groups, "max_shard_bytes": MAX_SHARD_BYTES}
    written: list[str] = []

    class Recorded(FileWriter):
        def finish(self) -> None:
            super().finish()
            written.append(self._plan.name)

    class Refused(FileWriter):
        def finish(self) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shared_writing.FileWriter = Recorded  # type: ignore[misc]
    export_hf(model, arch, hf, out / "whole", **given)
    shared_writing.FileWriter = Refused if groups.rank == 3 else FileWriter  # type: ignore[misc]
    with pytest.raises(ConversionError) as failed:
        export_hf(model, arch, hf, out / "failed", **given)
    shared_writing.FileWriter = FileWriter  # type: ignore[misc]
    stop = StopRequest(groups)
    stop._received = groups.rank == 2
    with pytest.raises(RunStopped):
        export_hf(model, arch, hf, out / "stopped", stop=stop, **given)
    shutdown_runtime()
    return {"written": written, "failed": str(failed.value)}


@pytest.mark.dist
@pytest.mark.slow
def test_every_rank_writes_and_a_failure_or_signal_of_one_is_everybodys(tmp_path: Path) -> None:
    hf, out = write_hf_model(tmp_path / "hf", "llama31"), tmp_path / "out"
    results = run_distributed(export, 4, hf, out)
    written = [name for result in results for name in result["written"]]
    assert all(result["written"] for result in results)
    assert sorted(written) == sorted(path.name for path in (out / "whole").glob("*.safetensors"))
    expected = load_file(hf / "model.safetensors")
    found = {name: tensor for path in (out / "whole").glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    refused = f"--save-hf {out / 'failed'} cannot be written: [Errno 28] No space left on device. Free some space or name another"
    assert {result["failed"].startswith(refused) for result in results} == {True}
    assert [path.name for path in out.iterdir()] == ["whole"]
