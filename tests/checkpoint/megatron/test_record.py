"""What a checkpoint's record says, and what it is told apart from: damage, older versions, newer ones."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rmipo.checkpoint.megatron.directory import fault_of, latest_complete_iteration
from megatron_rmipo.checkpoint.megatron.record import (
    RECORD_NAME,
    CheckpointRecord,
    NewerCheckpointError,
    _content_digest,
    read_record,
    write_record,
)
from megatron_rmipo.errors import CheckpointError
from tests.checkpoint.models import flip_bit


def write(path: Path, **changes: Any) -> Path:
    """A checkpoint folder whose record has these fields changed, and a digest that fits."""
    path.mkdir()
    (path / "__0_0.distcp").write_text("weights")
    write_record(path, CheckpointRecord(12, {"step": 12, "options": {"gamma": 0.1, "names": ["a", "b"]}}), {})
    if changes:
        content = json.loads((path / RECORD_NAME).read_text())
        del content["digest"]
        content = {name: value for name, value in {**content, **changes}.items() if value is not None}
        if content["format_version"] > 1:
            content["digest"] = _content_digest(content)
        (path / RECORD_NAME).write_text(json.dumps(content))
    return path


def test_sizes_and_digests_are_those_of_the_files(tmp_path: Path) -> None:
    record = read_record(write(tmp_path / "iter_0000012"))
    assert record is not None
    assert record.files == {"__0_0.distcp": 7}
    assert record.digests == {"__0_0.distcp": hashlib.sha256(b"weights").hexdigest()}
    assert record.train_state["options"] == {"gamma": 0.1, "names": ["a", "b"]}


@pytest.mark.parametrize("seed", range(40))
def test_no_bit_of_it_can_turn_over_unseen(tmp_path: Path, seed: int) -> None:
    path = write(tmp_path / "iter_0000012")
    before = read_record(path)
    flip_bit(path / RECORD_NAME, seed)
    with contextlib.suppress(_Damaged):
        # White space may become other white space.
        assert _read_or_damaged(path) == before


class _Damaged(Exception):
    pass


def _read_or_damaged(path: Path) -> CheckpointRecord | None:
    try:
        return read_record(path)
    except NewerCheckpointError:
        raise
    except CheckpointError as error:
        raise _Damaged from error


def test_format_1_has_no_digests_and_is_loadable(tmp_path: Path) -> None:
    path = write(tmp_path / "iter_0000012", format_version=1, digests=None, written_by=None)
    record = read_record(path)
    assert record is not None
    assert (record.iteration, record.digests) == (12, {})
    assert fault_of(path) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 3, "written_by": "megatron_rmipo 7.1"}, "written by megatron_rmipo 7.1 in format 3"),
        ({"shards": 5, "written_by": "megatron_rmipo 7.1"}, "with shards, which is not known here"),
    ],
)
def test_newer_version_is_named_and_nothing_older_taken_for_it(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    older = tmp_path / "iter_0000004"
    older.mkdir()
    write_record(older, CheckpointRecord(4), {})
    assert latest_complete_iteration(tmp_path) == 4
    write(tmp_path / "iter_0000012", **changes)
    with pytest.raises(NewerCheckpointError, match=words) as failure:
        latest_complete_iteration(tmp_path)
    assert "update it" in str(failure.value)
