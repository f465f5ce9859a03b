"""A checkpoint that would run code is refused without running it; what checkpoints do hold is read."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rmipo.checkpoint.megatron import common_state
from megatron_rmipo.checkpoint.megatron.directory import read_metadata
from megatron_rmipo.checkpoint.megatron.torch_dist import Entry, Piece, check_archives, write_torch_dist
from megatron_rmipo.checkpoint.megatron.unpickling import restricted_unpickling
from megatron_rmipo.errors import CheckpointError
from tests.checkpoint.models import write_checkpoint, write_hf_model


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def by_attribute(marker: Path) -> bytes:
    """A pickle that reaches os.mkdir through a module that a checkpoint may name."""
    name = "torch.distributed.checkpoint.filesystem"
    return b"\x80\x04" + b"c" + name.encode() + b"\nos.mkdir\n" + pickle.dumps((str(marker),), 4)[2:-1] + b"R."


def stacked(marker: Path) -> bytes:
    """The same, as STACK_GLOBAL, which takes dotted names."""
    text = lambda value: b"\x8c" + bytes([len(value)]) + value.encode()  # noqa: E731
    named = text("torch.distributed.checkpoint.filesystem") + text("os.mkdir") + b"\x93"
    return b"\x80\x04" + named + text(str(marker)) + b"\x85R."


def archive_of(value: object) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save({"state": value}, stream)
    stream.seek(0)
    return stream


WAYS: dict[str, Callable[[Evil], object]] = {
    "load": lambda evil: pickle.load(io.BytesIO(pickle.dumps(evil))),
    "loads": lambda evil: pickle.loads(pickle.dumps(evil)),
    "Unpickler": lambda evil: pickle.Unpickler(io.BytesIO(pickle.dumps(evil))).load(),
    "torch": lambda evil: torch.load(archive_of(evil), weights_only=False),
}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_called(tmp_path: Path, way: str) -> None:
    marker = tmp_path / "ran"
    with restricted_unpickling(), pytest.raises(pickle.UnpicklingError, match="mkdir is nothing that a checkpoint may hold"):
        WAYS[way](Evil(marker))
    assert not marker.exists()
    WAYS[way](Evil(marker))
    assert marker.exists(), "outside it pickles are as they were"


@pytest.mark.parametrize("make", [by_attribute, stacked])
def test_what_a_room_has_imported_is_not_its_own(tmp_path: Path, make: Any) -> None:
    with restricted_unpickling(), pytest.raises(pickle.UnpicklingError, match="nothing that a checkpoint may hold"):
        pickle.loads(make(tmp_path / "ran"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch.distributed.checkpoint.filesystem", "FileSystemWriter"),
        ("torch.distributed.checkpoint.filesystem", "pickle"),
        ("torch", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("megatron.core.dist_checkpointing.core", "save_config"),
        ("pathlib", "os"),
    ],
)
def test_refused_by_name(module: str, name: str) -> None:
    with restricted_unpickling(), pytest.raises(pickle.UnpicklingError, match="nothing that a checkpoint may hold"):
        pickle.loads(b"\x80\x04c" + f"{module}\n{name}\n".encode() + b".")


def test_what_checkpoints_hold_is_read() -> None:
    held = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "scalar": np.float64(0.5),
        "torch": torch.get_rng_state(),
        "parameter": torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        "types": (torch.float16, torch.strided, torch.Size([2, 3]), torch.device("cpu")),
        "state": [io.BytesIO(b"scales"), argparse.Namespace(lr=0.1), {1, 2}, Path("/a")],
    }
    stream = io.BytesIO()
    torch.save(held, stream)
    stream.seek(0)
    with restricted_unpickling():
        found = torch.load(stream, weights_only=False)
    assert found["python"] == held["python"]
    assert np.array_equal(found["numpy"][1], held["numpy"][1])
    assert torch.equal(found["torch"], held["torch"])
    assert torch.equal(found["parameter"], held["parameter"])
    assert found["types"] == held["types"]
    assert found["state"][0].read() == b"scales"


@pytest.mark.parametrize("name", [".metadata", "common.pt", "the common state as an object"])
def test_files_that_would_run_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(common_state, "is_written_as_object", lambda: name != "common.pt")
    path = write_checkpoint(tmp_path / "run", 4, write_hf_model(tmp_path / "hf", "llama32_tied"))
    check_archives(path)
    if name == ".metadata":
        (path / name).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
        with pytest.raises(CheckpointError, match=r"\.metadata.*mkdir is nothing that a checkpoint may hold"):
            read_metadata(path)
    else:
        evil = tmp_path / "evil"
        evil.mkdir()
        entry = Entry("embedding.weight", (1,), torch.float32, (Piece((0,), (1,), lambda values: None),))
        write_torch_dist(evil, [entry], [], {"args": Evil(tmp_path / "ran")})
        file = name if name == "common.pt" else "__0_0.distcp"
        with pytest.raises(CheckpointError, match=rf"{file} is damaged.*mkdir is nothing that a checkpoint may hold"):
            check_archives(evil)
    assert not (tmp_path / "ran").exists()
