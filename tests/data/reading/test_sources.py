from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_rmipo.data.reading.columns import column_names
from megatron_rmipo.data.reading.rows import RowFault
from megatron_rmipo.data.reading.sources import Source, first_rows, load_payload, open_sources
from megatron_rmipo.errors import DataError
from tests.data.reading import files
from tests.data.reading.files import KINDS

ROWS = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(7)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


PRETTY = "\n\n" + "\n".join(json.dumps(row, indent=2) for row in ROWS)


def open_source(name: str, split: str | None = None) -> Source:
    (source,) = open_sources(name, split)
    return source


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


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows_twice(kind: str, tmp_path: Path) -> None:
    source = open_source(str(files.write(tmp_path, kind)))
    assert source.num_rows == (7 if kind in ("a.jsonl", "a.json", "a.json.zst", "a.parquet", "utf-32.json") else None)
    assert read(source) == read(source) == files.ROWS


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda d: write(d / "a.jsonl", LINES.rstrip("\n")), id="jsonl without a last newline"),
        pytest.param(lambda d: write(d / "a.jsonl", "\ufeff" + LINES), id="jsonl with a byte order mark"),
        pytest.param(lambda d: write(d / "a.json", LINES), id="json lines named json"),
        pytest.param(lambda d: write(d / "a.json", PRETTY), id="objects over several lines, named json"),
        pytest.param(lambda d: write_arrow(d / "a.arrow", streaming=False), id="arrow file"),
    ],
)
def test_the_form_of_a_kind_does_not_matter(make: Any, tmp_path: Path) -> None:
    assert read(open_source(str(make(tmp_path)))) == ROWS


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
    (note,) = source.notes
    assert "a.jsonl: not one object a line, as its name says; read as a JSON document of 7 rows" in note


@pytest.mark.parametrize("first", ['{"prompt": "p", "cho', '{"prompt": "p",', "{", "prompt", '{"a": ' * 100_000, "[1]", "null"])
def test_a_damaged_first_line_is_one_row_of_its_file(first: str, tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path / "a.jsonl", first + "\n" + LINES)))
    assert source.notes == ()
    damaged, *others = list(source)
    assert [load_payload(row.payload) for row in others] == ROWS
    with pytest.raises(RowFault):
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


@pytest.mark.parametrize(
    "row",
    [
        {"messages": []},
        {"prompt": "x", "completion": [{"role": "assistant", "content": "y"}]},
        {"question": "x", "good": "y", "bad": "z"},
        {"talk": [{"from": "human", "value": "x"}], "good": "y", "tags": ["a", "b"]},
    ],
)
def test_an_object_that_holds_no_list_of_rows_is_one_row(row: dict[str, Any], tmp_path: Path) -> None:
    assert read(open_source(str(write(tmp_path / "a.json", json.dumps(row))))) == [row]


def test_an_object_with_a_column_that_the_user_names_is_one_row(tmp_path: Path) -> None:
    row = {"q": "x", "completions": [{"text": "y"}, {"text": "z"}]}
    path = str(write(tmp_path / "a.json", json.dumps(row)))
    source = open_source(path)
    assert read(source) == row["completions"]
    assert source.notes == (f"{path}: its one list of objects holds the rows; beside it, and not read: q",)
    names = column_names({"prompt": "q", "chosen": "completions[0].text"})
    assert names >= {"q", "completions"}
    assert read(open_sources(path, columns=names)[0]) == [row]


def test_a_saved_data_set_is_read_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:2])})
    both.save_to_disk(str(tmp_path / "saved"))
    assert read(open_source(str(tmp_path / "saved"), "test")) == ROWS[:2]
    with pytest.raises(DataError, match=r"--split is needed\. It has: train, test"):
        open_source(str(tmp_path / "saved"))
    with pytest.raises(DataError, match="--split tset: no such split"):
        open_source(str(tmp_path / "saved"), "tset")


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
        (lambda d: write(d / "a.jsonl", "[\n" + LINES), "line 3, column 1: not valid JSON"),
        (lambda d: write_bytes(d / "a.jsonl", b"PK\x03\x04..."), "is a zip archive"),
        (lambda d: write_bytes(d / "a.jsonl.gz", b"BZh9..."), "is compressed by bzip2"),
        (lambda d: write_parquet(d / "a.parquet").rename(d / "a.parquet.gz"), "compressed within themselves"),
        (lambda d: write_parquet(d / "a.parquet").rename(d / "a.jsonl"), "is a parquet file. Name it .parquet"),
        (lambda d: write(d / "a.jsonl", "version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (lambda d: write(d / "a.jsonl", "<!DOCTYPE html>\n<html>"), "is HTML or XML"),
        (lambda d: write(d / "a.txt", "a,b\n"), r"\.txt is not a known kind of file"),
        (lambda d: write(d / "a.json", "[1, 2"), "line 1, column 6: not valid JSON"),
        (lambda d: write(d / "a.json", "7"), "a list of rows is expected, or an object; found int"),
        (lambda d: write(d / "a.json", '{"a": [{"x": 1}], "b": [{"x": 2}]}'), "several lists of rows: a, b"),
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
    with pytest.raises(RowFault, match="nested too deeply"):
        load_payload(deep.encode())


def test_first_rows_of_which_none_is_readable_are_an_error(tmp_path: Path) -> None:
    good = open_source(str(write(tmp_path / "a.jsonl", "{\n7\n" + LINES)))
    assert first_rows([good]) == ROWS
    bad = open_source(str(write(tmp_path / "b.jsonl", "{\n7\n")))
    with pytest.raises(DataError, match=r"none of the first 2 rows is readable.*\n.*b\.jsonl: line 1: not a JSON object"):
        first_rows([bad])
    with pytest.raises(DataError, match=r"c\.csv: no rows"):
        first_rows([open_source(str(write(tmp_path / "c.csv", "prompt,chosen,rejected\n")))])


def test_a_line_that_is_no_object_is_a_fault() -> None:
    with pytest.raises(RowFault, match="found list"):
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
def test_a_line_is_read_as_the_json_module_reads_it_as_utf_8(line: bytes) -> None:
    try:
        expected: object = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        with pytest.raises(RowFault, match=f"^byte {error.start + 1} of the line is 0x{line[error.start]:02x}") as fault:
            load_payload(line)
        assert fault.value.reason == "not_utf8"
    except ValueError as error:
        with pytest.raises(RowFault, match=f"^not a JSON object: {re.escape(str(error))}$"):
            load_payload(line)
    else:
        if isinstance(expected, dict):
            assert repr(load_payload(line)) == repr(expected)
        else:
            with pytest.raises(RowFault, match="an object with columns expected"):
                load_payload(line)
