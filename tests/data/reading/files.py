"""The same rows in every kind of file that is read."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROWS = [{"prompt": f"p{i}", "chosen": f"c{i}, \u043c\u0438\u0440", "rejected": f'r"{i}"\nand more'} for i in range(7)]
Row = dict[str, Any]


def lines_of(rows: Sequence[Row], **options: Any) -> str:
    return "".join(json.dumps(row, **options) + "\n" for row in rows)


def cells_of(rows: Sequence[Row], delimiter: str = ",") -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def zstd(content: bytes) -> bytes:
    import pyarrow

    packed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(content)
    return bytes(packed.getvalue().to_pybytes())


def _parquet(rows: Sequence[Row]) -> bytes:
    import pyarrow.parquet

    packed = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), packed, row_group_size=3)
    return bytes(packed.getvalue().to_pybytes())


def _arrow(rows: Sequence[Row]) -> bytes:
    import pyarrow

    packed, table = pyarrow.BufferOutputStream(), pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(packed, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return bytes(packed.getvalue().to_pybytes())


# File name -> its content.
KINDS: dict[str, Callable[[Sequence[Row]], bytes]] = {
    "a.jsonl": lambda rows: lines_of(rows).encode(),
    "a.jsonl.gz": lambda rows: gzip.compress(lines_of(rows).encode()),
    "a.jsonl.zst": lambda rows: zstd(lines_of(rows[:3]).encode()) + zstd(lines_of(rows[3:]).encode()),  # two frames
    "a.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "a.json.zst": lambda rows: zstd(json.dumps({"train": rows}).encode()),
    "a.csv": lambda rows: cells_of(rows).encode(),
    "a.csv.gz": lambda rows: gzip.compress(cells_of(rows).encode("utf-8-sig")),
    "a.tsv": lambda rows: cells_of(rows, "\t").encode(),
    "a.parquet": _parquet,
    "a.arrow": _arrow,
    "utf-16.jsonl": lambda rows: lines_of(rows, ensure_ascii=False).encode("utf-16"),
    "utf-32.json": lambda rows: json.dumps(rows, ensure_ascii=False).encode("utf-32"),
    "utf-16.csv": lambda rows: cells_of(rows, "\t").encode("utf-16"),
    "cr.jsonl": lambda rows: b"\xef\xbb\xbf" + lines_of(rows, ensure_ascii=False).replace("\n", "\r").encode(),
}


def write(folder: Path, name: str, rows: Sequence[Row] = ROWS) -> Path:
    """Write rows in the kind of file that a name of :data:`KINDS` says."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(KINDS[name](rows))
    return path
