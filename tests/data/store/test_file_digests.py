"""Digests of a data set's files: what is believed of them, and what is read again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rmipo.data.store import file_digests
from megatron_rmipo.data.store.manifest import Manifest, store_paths
from megatron_rmipo.data.store.reference_scores import data_fingerprint
from tests.integration.data import write_pairs


def whole(prefix: Path) -> str:
    """The fingerprint, out of all bytes."""
    files = [store_paths(prefix)[kind].read_bytes() for kind in ("bin", "idx")]
    return hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in files)).hexdigest()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read from end to end; every file is a large one."""
    names: list[str] = []
    compute = file_digests._compute

    def counted(path: Path, size: int) -> str:
        names.append(path.name)
        return compute(path, size)

    monkeypatch.setattr(file_digests, "_compute", counted)
    monkeypatch.setattr(file_digests, "_LARGE_BYTES", 1)
    return names


def forget_digests(prefix: Path) -> None:
    """As a manifest of an earlier version."""
    path = store_paths(prefix)["json"]
    fields = json.loads(path.read_text())
    assert fields.pop("file_digests").keys() == {"bin", "idx"}
    path.write_text(json.dumps(fields))


def test_what_was_hashed_while_it_was_written_is_not_read_again(tmp_path: Path, computed: list[str]) -> None:
    prefix = write_pairs(tmp_path / "pairs")
    computed.clear()
    assert data_fingerprint(str(prefix)) == whole(prefix)
    assert computed == []
    assert not (tmp_path / "pairs.reference").exists()


def flip_a_byte(prefix: Path) -> None:
    content = bytearray(store_paths(prefix)["bin"].read_bytes())
    content[len(content) // 2] ^= 1
    store_paths(prefix)["bin"].write_bytes(content)


def copy_another_manifest(prefix: Path) -> None:
    """That of data of the same sizes; it is the newest file."""
    other = write_pairs(prefix.parent / "other", swap_first=True)
    shutil.copy(store_paths(other)["json"], store_paths(prefix)["json"])


@pytest.mark.parametrize("change", [flip_a_byte, copy_another_manifest, forget_digests])
def test_a_manifest_that_may_lie_is_not_believed(tmp_path: Path, computed: list[str], change: Callable[[Path], None]) -> None:
    prefix = write_pairs(tmp_path / "pairs")
    change(prefix)
    computed.clear()
    assert data_fingerprint(str(prefix)) == whole(prefix)
    assert "pairs.bin" in computed


@pytest.mark.parametrize("cache", [None, "elsewhere"])
def test_what_had_to_be_read_is_read_once(tmp_path: Path, computed: list[str], cache: str | None) -> None:
    prefixes = [write_pairs(tmp_path / name, first=first) for first, name in enumerate(("one", "other"))]
    directory = None if cache is None else str(tmp_path / cache)
    for prefix in prefixes:
        forget_digests(prefix)
    computed.clear()
    for _ in range(2):
        for prefix in prefixes:
            assert data_fingerprint(str(prefix), directory) == whole(prefix)
    assert computed == ["one.bin", "one.idx", "other.bin", "other.idx"]
    kept = tmp_path / (cache or "one.reference") / file_digests.KEPT_NAME
    # Of another time, as after an edit in place; a damaged file, or a directory that cannot be written, costs time alone.
    os.utime(store_paths(prefixes[0])["bin"])
    assert data_fingerprint(str(prefixes[0]), directory) == whole(prefixes[0])
    kept.write_text("[[")
    assert data_fingerprint(str(prefixes[0]), directory) == whole(prefixes[0])
    assert computed[4:] == ["one.bin", "one.bin", "one.idx"]
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert data_fingerprint(str(prefixes[0]), str(blocked)) == whole(prefixes[0])


def test_a_file_that_was_not_written_from_end_to_end_has_no_digest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as stream:
        hashed = file_digests.HashedStream(stream)
        hashed.write(b"abc")
        hashed.seek(2, os.SEEK_CUR)
        hashed.write(b"d")
    assert hashed.digest_of(path) is None
    digest = file_digests.digest_of(path)
    assert digest.sha256 == hashlib.sha256(b"abc\0\0d").hexdigest()
    manifest = dataclasses.replace(
        Manifest.read(store_paths(write_pairs(tmp_path / "pairs"))["json"]), file_digests={"bin": digest}
    )
    (tmp_path / "again.json").write_text(manifest.to_json())
    assert Manifest.read(tmp_path / "again.json") == manifest
