from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_rmipo.data.reading.sources import Source, load_payload, open_source
from megatron_rmipo.errors import DataError

ROWS = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(7)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


PRETTY = "\n\n" + "\n".join(json.dumps(row, indent=2) for row in ROWS)


def read(source: Source) -> list[Any]:
    return [load_payload(row.payload) for row in source]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def write_gzip(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()))
    return path


def write_parquet(path: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=3)
    return path


def write_arrow(path: Path, *, streaming: bool) -> Path:
    import pyarrow

    table = pyarrow.Table.from_pylist(ROWS)
    new = pyarrow.ipc.new_stream if streaming else pyarrow.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return path


@pytest.mark.parametrize(
    ("make", "num_rows"),
    [
        pytest.param(lambda d: write(d / "a.jsonl", LINES), 7, id="jsonl"),
        pytest.param(lambda d: write(d / "a.jsonl", LINES.rstrip("\n")), 7, id="jsonl without a last newline"),
        pytest.param(lambda d: write(d / "a.jsonl", "\ufeff" + LINES), 7, id="jsonl with a byte order mark"),
        pytest.param(lambda d: write_gzip(d / "a.jsonl.gz", LINES), None, id="jsonl.gz"),
        pytest.param(lambda d: write(d / "a.json", LINES), 7, id="json lines named json"),
        pytest.param(lambda d: write(d / "a.json", json.dumps(ROWS, indent=2)), 7, id="json list"),
        pytest.param(lambda d: write(d / "a.json", json.dumps({"train": ROWS})), 7, id="json object with a list"),
        pytest.param(lambda d: write(d / "a.json", PRETTY), 7, id="objects over several lines, named json"),
        pytest.param(lambda d: write_gzip(d / "a.json.gz", json.dumps(ROWS)), 7, id="json.gz"),
        pytest.param(lambda d: write_parquet(d / "a.parquet"), 7, id="parquet"),
        pytest.param(lambda d: write_arrow(d / "a.arrow", streaming=True), None, id="arrow stream"),
        pytest.param(lambda d: write_arrow(d / "a.arrow", streaming=False), None, id="arrow file"),
    ],
)
def test_every_kind_of_file_gives_the_same_rows_twice(make: Any, num_rows: int | None, tmp_path: Path) -> None:
    source = open_source(str(make(tmp_path)))
    assert source.num_rows == num_rows
    assert read(source) == ROWS
    assert read(source) == ROWS


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "\ufeff\n" + json.dumps(ROWS) + "\n\n",
        PRETTY,
        json.dumps({"train": ROWS}, indent=1),
    ],
    ids=["list", "pretty list", "list with a byte order mark", "pretty objects", "pretty object with a list"],
)
@pytest.mark.parametrize("make", [write, write_gzip])
def test_lines_by_name_alone_are_read_with_a_note(make: Any, text: str, tmp_path: Path) -> None:
    source = open_source(str(make(tmp_path / "a.jsonl", text)))
    assert read(source) == read(source) == ROWS
    assert source.num_rows == 7
    assert source.note is not None
    assert "a.jsonl: not one object a line, as its name says; read as a JSON document of 7 rows" in source.note


@pytest.mark.parametrize("first", ['{"prompt": "p", "cho', '{"prompt": "p",', "{", "prompt", '{"a": ' * 100_000, "[1]", "null"])
def test_a_damaged_first_line_is_one_row_of_its_file(first: str, tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path / "a.jsonl", first + "\n" + LINES)))
    assert source.note is None
    damaged, *others = list(source)
    assert [load_payload(row.payload) for row in others] == ROWS
    with pytest.raises(ValueError):  # noqa: PT011
        load_payload(damaged.payload)
    # The only row of a file is one, too, whatever its columns.
    assert read(open_source(str(write(tmp_path / "b.jsonl", '{"question": "x"}')))) == [{"question": "x"}]


def test_numbers_are_those_of_the_lines(tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": 2}\n')))
    assert [row.number for row in source] == [1, 3]


def test_every_value_of_a_list_is_a_row(tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path / "a.json", '[null, {"a": 1}, 5, null, ""]')))
    assert source.num_rows == 5
    assert [(row.number, row.payload) for row in source] == [(1, None), (2, {"a": 1}), (3, 5), (4, None), (5, "")]


@pytest.mark.parametrize("row", [{"messages": []}, {"prompt": "x", "completion": [{"role": "assistant", "content": "y"}]}])
def test_an_object_with_our_columns_is_one_row(row: dict[str, Any], tmp_path: Path) -> None:
    assert read(open_source(str(write(tmp_path / "a.json", json.dumps(row))))) == [row]


def test_a_saved_data_set_is_read_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:2])})
    both.save_to_disk(str(tmp_path / "saved"))
    assert read(open_source(str(tmp_path / "saved"), "test")) == ROWS[:2]
    with pytest.raises(DataError, match=r"--split is needed\. It has: train, test"):
        open_source(str(tmp_path / "saved"))
    with pytest.raises(DataError, match="--split tset: no such split"):
        open_source(str(tmp_path / "saved"), "tset")


def test_a_folder_of_files_is_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", LINES)
    assert read(open_source(str(tmp_path / "folder"))) == ROWS


def test_a_name_that_cannot_be_loaded_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def refuse(*_args: object, **_options: object) -> None:
        raise ConnectionError("Couldn't reach 'somebody/pairs'")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match="--input somebody/pairs: neither a file nor a data set"):
        open_source("somebody/pairs")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "absent.jsonl", "no such file or directory"),
        (lambda d: write(d / "a.jsonl", ""), "the file is empty"),
        (lambda d: write(d / "a.jsonl", " \n\n"), "the file is empty but for blank lines"),
        (lambda d: write_gzip(d / "a.jsonl.gz", ""), "the file is empty"),
        (lambda d: write(d / "a.jsonl", "[\n" + LINES), "line 3: not valid JSON"),
        (
            lambda d: write_bytes(d / "a.jsonl", LINES.encode("utf-16")),
            "UTF-16 or UTF-32. Convert it, as with iconv",
        ),
        (lambda d: write_bytes(d / "a.json", LINES.encode("utf-16-le")), "is not UTF-8 but UTF-16"),
        (lambda d: write_bytes(d / "a.jsonl", LINES.encode("utf-32-be")), "is not UTF-8 but UTF-16"),
        (lambda d: write_bytes(d / "a.jsonl", b"PK\x03\x04..."), "is a zip archive"),
        (lambda d: write_bytes(d / "a.jsonl.gz", b"\x28\xb5\x2f\xfd..."), "is compressed by zstd"),
        (lambda d: write_parquet(d / "a.parquet").rename(d / "a.jsonl"), "is a parquet file. Name it .parquet"),
        (lambda d: write(d / "a.jsonl", "version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (lambda d: write(d / "a.jsonl", "<!DOCTYPE html>\n<html>"), "is HTML or XML"),
        (lambda d: write(d / "a.csv", "a,b\n"), r"\.csv is not a known kind of file"),
        (lambda d: write(d / "a.json", "[1, 2"), "line 1: not valid JSON"),
        (lambda d: write(d / "a.json", '{"a": [1], "b": [2]}'), "a list of rows is expected"),
        (lambda d: write(d / "a.parquet", "not parquet at all"), "not a readable parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        open_source(str(make(tmp_path)))


def test_damage_found_while_reading_is_an_error(tmp_path: Path) -> None:
    whole = write_gzip(tmp_path / "a.jsonl.gz", LINES).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-12])
    with pytest.raises(DataError, match="could not be read to its end"):
        list(open_source(str(tmp_path / "a.jsonl.gz")))
    arrow = write_arrow(tmp_path / "b.arrow", streaming=True)
    arrow.write_bytes(b"garbage" + arrow.read_bytes())
    with pytest.raises(DataError, match="not a readable Arrow file"):
        list(open_source(str(arrow)))


def damage(path: Path, start: int, end: int) -> Path:
    """Overwrite some bytes in the middle of a file."""
    whole = path.read_bytes()
    assert end < len(whole)
    path.write_bytes(whole[:start] + b"\xff" * (end - start) + whole[end:])
    return path


def test_damaged_bytes_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    lines = damage(write_gzip(tmp_path / "a.jsonl.gz", LINES), 12, 40)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: could not be read to its end .*\. Fetch or make the file again\."):
        list(open_source(str(lines)))
    document = damage(write_gzip(tmp_path / "a.json.gz", json.dumps(ROWS)), 12, 40)
    with pytest.raises(DataError, match=r"a\.json\.gz: could not be read .*\. Fetch or make the file again\."):
        open_source(str(document))
    parquet = damage(write_parquet(tmp_path / "a.parquet"), 4, 200)
    with pytest.raises(DataError, match=r"a\.parquet: not a readable parquet file .*\. Fetch or make the file again\."):
        list(open_source(str(parquet)))
    for streaming in (True, False):
        arrow = damage(write_arrow(tmp_path / "a.arrow", streaming=streaming), 8, 400)
        with pytest.raises(DataError, match=r"a\.arrow: not a readable Arrow file .*\. Fetch or make the file again\."):
            list(open_source(str(arrow)))


def test_nesting_beyond_the_reader_is_an_error(tmp_path: Path) -> None:
    deep = "[" * 100_000
    with pytest.raises(DataError, match="nested too deeply"):
        open_source(str(write(tmp_path / "a.json", deep)))
    with pytest.raises(ValueError, match="nested too deeply"):
        load_payload(deep.encode())


def test_a_split_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--split train: .* is a file"):
        open_source(str(write(tmp_path / "a.jsonl", LINES)), "train")


def test_a_line_that_is_no_object_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="found list"):
        load_payload(b"[1]")


ODD_LINES = [
    b'{"a": "x\\u00e9\\n", "b": [1, 2.5, null, NaN]}',
    b'{"a": 1}\n',
    b'{"a": 1}\r\n',
    b'  {"a": 1}\t \n',
    b'{"a": 1} {"b": 2}\n',
    b'{"a": 1},\n',
    b'{"a": 1}\x00\n',
    b"\xef\xbb\xbf" + b'{"a": 1}\n',
    '{"a": 1}'.encode("utf-16"),
    '{"a": 1}'.encode("utf-16-le"),
    b'{"a": "\xff"}\n',
    b'{"a": "\xed\xa0\xbd"}\n',
    b'{"a": "\\ud83d"}\n',
    b'{"a": "\t"}\n',
    b"{'a': 1}\n",
    b'{"a": 1\n',
    b"null\n",
    b"7 \n",
]


@pytest.mark.parametrize("line", ODD_LINES)
def test_a_line_is_read_as_the_json_module_reads_it(line: bytes) -> None:
    try:
        expected: object = json.loads(line)
    except ValueError as error:
        with pytest.raises(ValueError, match=f"^{re.escape(str(error))}$"):
            load_payload(line)
    else:
        if isinstance(expected, dict):
            assert repr(load_payload(line)) == repr(expected)
        else:
            with pytest.raises(ValueError, match="an object with columns expected"):
                load_payload(line)
