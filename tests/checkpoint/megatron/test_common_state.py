"""The common state in both of its forms: the file of Megatron-Core before 0.19, the object of versions from then on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_rmipo.checkpoint.convert import convert_hf_to_megatron
from megatron_rmipo.checkpoint.megatron import common_state
from megatron_rmipo.checkpoint.megatron.common_state import is_written_as_object, read_common
from megatron_rmipo.checkpoint.megatron.directory import fault_of
from megatron_rmipo.checkpoint.verify_checkpoint_cli import main as verify_checkpoint
from megatron_rmipo.errors import CheckpointError
from tests.checkpoint.models import write_checkpoint, write_hf_model


def write_as(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common_state, "is_written_as_object", lambda: form == "object")


@pytest.mark.parametrize("form", ["file", "object"])
def test_either_form_is_taken_everywhere_and_missed_where_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    write_as(form, monkeypatch)
    path = write_checkpoint(tmp_path / "run", 4, write_hf_model(tmp_path / "hf", "llama32_tied"))
    assert (path / "common.pt").exists() == (form == "file")
    assert read_common(path) == {"iteration": 4, "checkpoint_version": 3.0}
    # As another program leaves it.
    (path / ".metadata").write_bytes((path / ".metadata").read_bytes().replace(b"rmipo_random", b"their_random"))
    (path / "rmipo.json").unlink()
    assert fault_of(path) is None
    assert verify_checkpoint([str(tmp_path / "run")]) == 0
    if form == "file":
        (path / "common.pt").unlink()
        assert fault_of(path) == "common.pt is missing"
        with pytest.raises(CheckpointError, match=r"neither common\.pt nor common_state/shard_0_1"):
            read_common(path)
    else:
        data = (path / "__0_0.distcp").read_bytes()
        at = data.index(b"checkpoint_version")
        (path / "__0_0.distcp").write_bytes(data[:at] + b"C" + data[at + 1 :])
        assert verify_checkpoint([str(tmp_path / "run")]) == 1


def test_the_installed_version_reads_what_is_written(tmp_path: Path) -> None:
    path = convert_hf_to_megatron(write_hf_model(tmp_path / "hf", "llama32_tied"), tmp_path / "converted")
    assert (path / "common.pt").exists() != is_written_as_object()
    common = dist_checkpointing.load_common_state_dict(str(path))
    assert common.pop("args").num_layers == 4
    assert common == {
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": common_state.CONTENT,
        "rmipo_beyond_args": ["llama3's rotary scaling by other numbers than 8, 1, 4 and 8192"],
    }


def test_what_is_no_common_state_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_as("file", monkeypatch)
    path = write_checkpoint(tmp_path / "run", 4, write_hf_model(tmp_path / "hf", "llama32_tied"))
    torch.save([1], path / "common.pt")
    with pytest.raises(CheckpointError, match=r"common\.pt holds a list where the common state"):
        read_common(path)
