from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_rmipo.data.reading.directories import find_files, kind_of
from megatron_rmipo.data.reading.sources import Source, load_payload, open_sources
from megatron_rmipo.errors import DataError
from tests.data.reading.files import KINDS, ROWS, write

KNOWN = (".jsonl", ".csv", ".parquet")


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def found(name: str | Path, folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in find_files(str(name), KNOWN).files]


def test_all_kinds_below_a_directory_are_read_in_sorted_order(tmp_path: Path) -> None:
    names = sorted([*KINDS, *(f"below/{name}" for name in KINDS)])
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(KINDS[path.name](ROWS))
    touch(tmp_path, "README.md", ".gitattributes", ".git/a.bin", "dataset_infos.json", "below/LICENSE")
    sources = open_sources(str(tmp_path))
    assert [source.name for source in sources] == [str(tmp_path / name) for name in names]
    for source in sources:
        assert [load_payload(row.payload) for row in source] == ROWS, source.name
    note = f"{tmp_path}: {len(names)} of {len(names)} data files; no data: README.md, below/LICENSE, dataset_infos.json"
    assert sources[0].notes == (note,)


def test_what_preparing_leaves_is_no_data(tmp_path: Path) -> None:
    touch(tmp_path, "a.jsonl", "out.bin", "out.idx", "out.json", "out.rejects.jsonl", "out.incomplete.rejects.jsonl", "b.csv")
    touch(tmp_path, "out.incomplete.bin", "out.incomplete.idx", "out.incomplete.json")
    assert found(tmp_path, tmp_path) == ["a.jsonl", "b.csv"]
    assert found(tmp_path / "*.jsonl", tmp_path) == ["a.jsonl"]


def test_a_pattern_is_expanded_in_sorted_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "b.jsonl.gz", "a.jsonl.gz", "c.csv", "deep/er/d.jsonl.gz", "deep/e.csv", "[x].jsonl")
    assert found(tmp_path / "*.jsonl.gz", tmp_path) == ["a.jsonl.gz", "b.jsonl.gz"]
    assert found(tmp_path / "**" / "*.jsonl.gz", tmp_path) == ["a.jsonl.gz", "b.jsonl.gz", "deep/er/d.jsonl.gz"]
    assert found(tmp_path / "d*", tmp_path) == ["deep/e.csv", "deep/er/d.jsonl.gz"]
    monkeypatch.chdir(tmp_path)
    assert [str(path) for path in find_files("[ab].*", KNOWN).files] == ["a.jsonl.gz", "b.jsonl.gz"]
    (tmp_path / "[x].jsonl").write_text('{"a": 1}\n')
    assert [source.name for source in open_sources("[x].jsonl")] == ["[x].jsonl"]


def test_links_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    touch(tmp_path, "real/a.jsonl", "data/b.jsonl")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "data")
    assert found(tmp_path / "data", tmp_path) == ["data/b.jsonl", "data/linked/a.jsonl"]


@pytest.mark.parametrize(
    ("names", "pattern", "message"),
    [
        (["a.jsonl", "b.txt", "c/d.xlsx"], "", r"b\.txt, c/d\.xlsx: of no kind that is read .*Name the files .*\*\*/\*\.jsonl"),
        (["a.jsonl", *(f"{i}.bak" for i in range(9))], "*", r"0\.bak, 1\.bak, 2\.bak, 3\.bak, 4\.bak and 4 more: of no kind"),
        (["README.md"], "", r"no data files in it but README\.md"),
        ([], "", "no data files in it"),
        (["a.jsonl"], "*.csv", r"\*\.csv: no file matches"),
        (["a.jsonl"], "absent/*.jsonl", "no file matches"),
    ],
)
def test_what_is_left_out_is_an_error(names: list[str], pattern: str, message: str, tmp_path: Path) -> None:
    touch(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        open_sources(str(tmp_path / pattern))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"a\.jsonl: could not be read"):
        open_sources(str(tmp_path))
    if os.getuid():
        (tmp_path / "closed").mkdir(mode=0)
        with pytest.raises(DataError, match="closed: Permission denied"):
            open_sources(str(tmp_path))


def test_the_kind_is_that_under_the_compression() -> None:
    assert [kind_of(name) for name in ("A.JSONL.GZ", "a.b.csv.zst", "a.parquet", "a", "a.gz")] == [
        ".jsonl",
        ".csv",
        ".parquet",
        "",
        "",
    ]


def names_of(sources: list[Source], folder: Path) -> list[str]:
    return [str(Path(source.name).relative_to(folder)) for source in sources]


def test_no_split_comes_in_without_being_asked_for(tmp_path: Path) -> None:
    for name in ("helpful/train/a.csv", "helpful/test/a.csv", "harmless/train/a.jsonl.gz"):
        write((tmp_path / name).parent, Path(name).name)
    for name in (str(tmp_path), str(tmp_path / "**" / "*.*")):
        with pytest.raises(DataError, match=r"--split is needed\. By the names of its files it has: test, train"):
            open_sources(name)
        assert names_of(open_sources(name, "train"), tmp_path) == ["harmless/train/a.jsonl.gz", "helpful/train/a.csv"]
        assert names_of(open_sources(name, "test"), tmp_path) == ["helpful/test/a.csv"]
        with pytest.raises(DataError, match=r"--split tset: no such split\. By the names of its files it has: test, train"):
            open_sources(name, "tset")
    write(tmp_path, "a.csv")
    with pytest.raises(DataError, match=r"--split train: a\.csv may belong to it or not"):
        open_sources(str(tmp_path), "train")


def test_names_that_say_no_split_are_all_train(tmp_path: Path) -> None:
    write(tmp_path, "a.csv"), write(tmp_path, "a.jsonl")
    assert names_of(open_sources(str(tmp_path)), tmp_path) == names_of(open_sources(str(tmp_path), "train"), tmp_path)
    with pytest.raises(DataError, match=r"--split test: no such split\. By their names its files are of no split"):
        open_sources(str(tmp_path), "test")
