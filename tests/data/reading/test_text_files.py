from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from megatron_rmipo.data.reading.rows import RowFault
from megatron_rmipo.data.reading.sources import load_payload, open_sources
from megatron_rmipo.data.reading.text_files import open_text_file
from megatron_rmipo.errors import DataError
from tests.data.reading.files import ROWS, lines_of, zstd

CHINESE = [{"prompt": f"\u4e2d\u6587{i}", "chosen": "\u597d\u7684", "rejected": "\u4e0d"} for i in range(5)]
FRENCH = [{"prompt": f"\u00e9t\u00e9 {i}", "chosen": "voil\u00e0", "rejected": "no\u00ebl"} for i in range(5)]
RUSSIAN = [{"prompt": f"\u043c\u0438\u0440 {i}", "chosen": "\u0434\u0430", "rejected": "\u043d\u0435\u0442"} for i in range(5)]


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("rows", "encoding", "named"),
    [
        (CHINESE, "gbk", "5 of its first 5 lines are in another encoding. It may be GBK.*\n  iconv -f GBK -t UTF-8"),
        (FRENCH, "latin-1", "It may be WINDOWS-1252.*\n  iconv -f WINDOWS-1252 -t UTF-8"),
        (RUSSIAN, "cp1251", "WINDOWS-1251.*\n  iconv -f"),
        (RUSSIAN, "utf-16-le", "UTF-16LE, without a byte order mark"),
        (RUSSIAN, "utf-16-be", "iconv -f UTF-16BE"),
        (RUSSIAN, "utf-32-le", "iconv -f UTF-32LE"),
        (RUSSIAN, "utf-32-be", "iconv -f UTF-32BE"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv"])
def test_another_encoding_is_named_with_the_remedy(
    rows: list[dict[str, str]], encoding: str, named: str, name: str, tmp_path: Path
) -> None:
    content = lines_of(rows, ensure_ascii=False).encode(encoding)
    with pytest.raises(DataError, match=f"(?s)is not UTF-8.*{named}"):
        open_sources(write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content))


def test_a_document_in_another_encoding_is_named_by_its_byte(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf[\n{"prompt": "x"},\n{"prompt": "\xe9 "}\n]'
    with pytest.raises(DataError, match=r"byte 35 \(line 3\) is 0xe9\. It may be WINDOWS-1252"):
        open_sources(write(tmp_path / "a.json", content))


def test_single_lines_in_another_encoding_are_rows_to_reject(tmp_path: Path) -> None:
    good = lines_of(ROWS, ensure_ascii=False).encode().splitlines(keepends=True)
    lines = [
        good[0],
        b'{"prompt": "xyz\xe9", "chosen": "a", "rejected": "b"}\n',
        *good[1:],
        "\u0434\u0430".encode("utf-16-le") + b"\n",
    ]
    (source,) = open_sources(write(tmp_path / "a.jsonl", b"".join(lines)))
    rows = list(source)
    assert [row.number for row in rows] == list(range(1, 10))
    faults = {}
    for row in rows:
        try:
            assert load_payload(row.payload) in ROWS
        except RowFault as fault:
            faults[row.number] = (fault.reason, fault.message)
    assert faults[2] == ("not_utf8", "byte 16 of the line is 0xe9, which is not UTF-8 there (invalid continuation byte)")
    assert faults.keys() == {2, 9}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_line_ends_of_any_kind_keep_their_numbers(encoding: str, tmp_path: Path) -> None:
    for end in ("\n", "\r\n", "\r"):
        text = end.join(["{}", "", '{"a": "\u2028\x85"}', ""])
        (source,) = open_sources(write(tmp_path / "a.jsonl", text.encode(encoding)))
        assert [(row.number, load_payload(row.payload)) for row in source] == [(1, {}), (3, {"a": "\u2028\x85"})]


def test_half_a_character_of_utf_16_is_one_row_and_a_cut_file_an_error(tmp_path: Path) -> None:
    content = lines_of(ROWS, ensure_ascii=False)
    half = '{"prompt": "\ud83d"}\n'.encode("utf-16-le", "surrogatepass")
    (source,) = open_sources(write(tmp_path / "a.jsonl", content.encode("utf-16") + half))
    *good, bad = (row.payload for row in source)
    assert [load_payload(payload) for payload in good] == ROWS
    with pytest.raises(RowFault, match="is not UTF-8 there"):
        load_payload(bad)
    (source,) = open_sources(write(tmp_path / "a.jsonl", content.encode("utf-16")[:-1]))
    with pytest.raises(DataError, match="could not be read to its end"):
        list(source)


def test_a_long_first_line_is_looked_at_without_its_end(tmp_path: Path) -> None:
    # The beginning that is looked at ends within a character of two bytes.
    line = b'{"a": "x' + "\u044f".encode() * 200_000 + b'"}\n'
    file = open_text_file(Path(write(tmp_path / "a.jsonl", line)), "a.jsonl")
    assert list(file.lines()) == [line]
    with pytest.raises(DataError, match="1 of its first 1 lines"):
        open_text_file(Path(write(tmp_path / "a.jsonl", line.decode().encode("cp1251"))), "a.jsonl")


def test_damage_of_zstd_is_an_error(tmp_path: Path) -> None:
    whole = zstd(lines_of(ROWS * 100).encode())
    for content in (whole[:-3], whole[:20] + b"\xff" * 20 + whole[40:], whole + b"garbage"):
        with pytest.raises(DataError, match=r"a\.jsonl\.zst: could not be read to its end .*\. Fetch or make the file again\."):
            list(open_sources(write(tmp_path / "a.jsonl.zst", content))[0])
