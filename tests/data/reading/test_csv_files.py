from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_rmipo.data.reading.rows import RowFault
from megatron_rmipo.data.reading.sources import load_payload, open_sources
from megatron_rmipo.errors import DataError


def read(path: Path, text: str | bytes) -> list[Any]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    (source,) = open_sources(str(path))
    return [load_payload(row.payload) for row in source]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_cells_are_text_and_empty_ones_null(end: str, tmp_path: Path) -> None:
    records = ["a,b", "007,1e3", "true,", "", ' x ,"say ""no"", twice"', '"",NA']
    expected = [
        {"a": "007", "b": "1e3"},
        {"a": "true", "b": None},
        {"a": " x ", "b": 'say "no", twice'},
        {"a": None, "b": "NA"},
    ]
    assert read(tmp_path / "a.csv", end.join(records)) == expected


def test_a_quoted_cell_keeps_its_line_ends_and_may_be_long(tmp_path: Path) -> None:
    long = "two\r\nlines, \n\n" * 100_000
    assert read(tmp_path / "a.csv", f'a,b\n"{long}",x\ny,z\n') == [{"a": long, "b": "x"}, {"a": "y", "b": "z"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.csv", "a;b\n1,5;2\n"), ("a.csv", "a\tb\n1,5\t2\n"), ("a.tsv", "a\tb\n1,5\t2\n"), ("a.TSV", "\ufeffa\tb\n1,5\t2")],
)
def test_cells_are_separated_as_those_of_the_header(name: str, text: str, tmp_path: Path) -> None:
    assert read(tmp_path / name, text) == [{"a": "1,5", "b": "2"}]


def test_a_column_without_a_name_gets_one(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", ",a\n0,x\n") == [{"Unnamed: 0": "0", "a": "x"}]


def test_a_record_that_does_not_fit_the_header_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'a,b\nx,"y\nz"\nx\nx,y,z\nx,\xe9 \nx,y\n')
    (source,) = open_sources(str(path))
    rows = list(source)
    assert [row.number for row in rows] == [1, 2, 3, 4, 5]
    assert [load_payload(rows[i].payload) for i in (0, 4)] == [{"a": "x", "b": "y\nz"}, {"a": "x", "b": "y"}]
    faults = []
    for row in rows[1:4]:
        with pytest.raises(RowFault) as fault:
            load_payload(row.payload)
        faults.append((fault.value.reason, fault.value.field, fault.value.message))
    assert faults == [
        ("malformed", "", "line 4: 1 cells, but the header names 2 columns"),
        ("malformed", "", "line 5: 3 cells, but the header names 2 columns"),
        ("not_utf8", "b", "line 6: character 1 of the cell is the byte 0xe9, which is not UTF-8"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n\n", "line 1: a header with the names of the columns is expected"),
        (",,\n1,2,3\n", "line 1: a header with the names of the columns is expected"),
        ("a,b,a\n1,2,3\n", "line 1: the header names 'a' twice"),
        (b"a,b\xe9\n" + b"1,2\n" * 3, "line 1: the header holds the byte 0xe9, which is not UTF-8"),
        ('a,b\nx,y\nx,"y\nx,y\n', "the row that starts at line 3 is not readable"),
        ('a,b\nx,"y" z\n', "the row that starts at line 2 is not readable"),
    ],
)
def test_what_shows_no_rows_is_an_error(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.csv", text)
