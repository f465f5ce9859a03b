from __future__ import annotations

from pathlib import Path, PurePath

import pytest

from megatron_rmipo.data.reading.sources import open_sources
from megatron_rmipo.data.reading.splits import Split, files_of_split, split_of
from megatron_rmipo.errors import DataError
from tests.data.reading.files import write


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train_prefs-00000-of-00003.parquet", "train_prefs"),
        ("train-00001-of-00002-a1b2c3.parquet", "train"),
        ("helpful-base/test.jsonl.gz", "test"),
        ("test/train.jsonl", "train"),
        ("dev/pairs.jsonl", "validation"),
        ("my_val2.csv", "validation"),
        ("Evaluation Set.csv", "test"),
        ("a/train/b/c.csv", "train"),
        ("train_test.csv", "train_test.csv"),
        ("latest/contest.csv", None),
        ("pairs.jsonl", None),
    ],
)
def test_the_split_is_in_the_name(path: str, split: str | None) -> None:
    assert split_of(PurePath(path)) == split


def test_shards_of_one_name_are_one_split() -> None:
    def chosen(wanted: str | None, *names: str) -> list[int]:
        return files_of_split([PurePath(name) for name in names], wanted, "DIR")

    shards = [f"{split}-0000{n}-of-00002.parquet" for split in ("train_prefs", "train_sft", "test_prefs") for n in (0, 1)]
    assert chosen("train_prefs", *shards) == [0, 1]
    with pytest.raises(DataError, match="it has: test_prefs, train_prefs, train_sft"):
        chosen(None, *shards)
    assert chosen("dev", "a/dev.csv", "a/train.csv") == chosen("validation", "a/dev.csv", "a/train.csv") == [0]
    # Names that say nothing about training and testing keep no file out.
    assert chosen(None, "part-00000-of-00002.csv", "part-00001-of-00002.csv", "more.csv") == [0, 1, 2]


@pytest.mark.parametrize(
    "text", ["train[:3]", "train[4:]", "train[-3:]", "train[:-2]", "train[10%:20%]", "train[35%:]", "train[2:50%]", "train[:99]"]
)
def test_a_part_is_that_of_datasets(text: str) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"n": list(range(21))})
    absolute = datasets.ReadInstruction.from_spec(text.replace("2:50%", "10%:50%")).to_absolute({"train": 21})[0]
    split = Split.parse(text.replace("2:50%", "10%:50%"))
    assert split.name == "train"
    assert list(range(*split.bounds(len(data)))) == list(range(absolute.from_, absolute.to))


@pytest.mark.parametrize("text", ["train[", "train[1]", "train[1:2:3]", "train[a:]", "", "train]", "train[1.5:]", "train[:%]"])
def test_what_is_no_split_is_an_error(text: str) -> None:
    with pytest.raises(DataError, match="expected a split, a part of it, or a part: train"):
        Split.parse(text)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("[:3]", [1, 2, 3]),
        ("train[5:9]", [6, 7, 1, 2]),
        ("[-3:]", [5, 6, 7]),
        ("[50%:]", [*range(4, 8), *range(1, 8)][:11][-11:]),
        ("[:99]", [*range(1, 8)] * 3),
        ("[7:14]", list(range(1, 8))),
    ],
)
def test_a_part_of_files_goes_through_them_in_order(text: str, numbers: list[int], tmp_path: Path) -> None:
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        write(tmp_path, name)
    sources = open_sources(str(tmp_path), text)
    assert [row.number for source in sources for row in source] == numbers
    assert sum(source.num_rows or 0 for source in sources) == len(numbers)
    assert all("rows" in source.describe() for source in sources)


def test_a_part_of_a_named_data_set_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {name: datasets.Dataset.from_dict({"n": list(range(10))}) for name in ("train", "test")}
    monkeypatch.setattr(datasets, "load_dataset", lambda _name: datasets.DatasetDict(splits))
    (source,) = open_sources("somebody/pairs", "train[:20%]")
    assert [row.payload["n"] for row in source] == [0, 1]
    assert source.describe() == {"name": "somebody/pairs[train]", "bytes": None, "rows": [0, 2]}


def test_a_part_of_a_file_or_saved_data_set_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = str(write(tmp_path, "a.jsonl"))
    assert [row.number for row in open_sources(path, "train[2:4]")[0]] == [3, 4]
    for text, message in [
        ("train", r"--split train: .* is a file and has no splits"),
        ("test[:3]", "--split test: no such split"),
        ("[9:]", "--split asks for rows 7 to 7 of 7: none"),
    ]:
        with pytest.raises(DataError, match=message):
            open_sources(path, text)
    both = {"train": datasets.Dataset.from_dict({"n": list(range(10))}), "test": datasets.Dataset.from_dict({"n": [0]})}
    datasets.DatasetDict(both).save_to_disk(str(tmp_path / "both"))
    both["train"].save_to_disk(str(tmp_path / "one"))
    for folder, text in (("both", "train[20%:50%]"), ("one", "[2:5]")):
        (source,) = open_sources(str(tmp_path / folder), text)
        assert [row.payload["n"] for row in source] == [2, 3, 4]
    with pytest.raises(DataError, match=r"--split train: .* has no splits"):
        open_sources(str(tmp_path / "one"), "train[:3]")
