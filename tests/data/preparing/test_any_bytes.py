"""Files of any content: a data set whose rows are all accounted for, or one error of ours. Never a traceback."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_rmipo.data.encoding.tokenize import PreferenceTokenizer
from megatron_rmipo.data.preparing.preprocess import PreprocessOptions, preprocess
from megatron_rmipo.data.reading.sources import open_sources
from megatron_rmipo.errors import DataError
from tests.data.reading.files import zstd

NUM_CASES = 100
ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".jsonl.gz", ".csv.zst")
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=6,
)
PAIRS = st.fixed_dictionaries({"prompt": ANY_TEXT, "chosen": ANY_TEXT, "rejected": ANY_TEXT})
ROWS = PAIRS | st.dictionaries(
    st.sampled_from(["prompt", "chosen", "rejected", "messages", "label"]) | ANY_TEXT, VALUES, max_size=4
)


def as_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")


def as_cells(records: list[list[str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["prompt", "chosen", "rejected"], *records])
    return text.getvalue().encode(errors="surrogatepass")


LINES = st.lists(ROWS.map(as_json) | st.binary(max_size=30), max_size=6)
CONTENTS = st.one_of(
    st.tuples(LINES, st.sampled_from([b"\n", b"\r", b"\r\n"])).map(lambda drawn: drawn[1].join(drawn[0])),
    st.lists(st.lists(ANY_TEXT, min_size=2, max_size=4), max_size=5).map(as_cells),
    st.tuples(st.lists(PAIRS, max_size=4), st.sampled_from(["utf-16", "utf-32", "utf-16-le", "gbk", "latin-1"])).map(
        lambda drawn: "\n".join(json.dumps(row, ensure_ascii=False) for row in drawn[0]).encode(drawn[1], "replace")
    ),
    st.lists(ROWS, max_size=4).map(as_json),
    VALUES.map(as_json),
    st.binary(max_size=60),
)
PACKED = st.sampled_from(
    [bytes, gzip.compress, zstd, lambda content: gzip.compress(content)[:-4], lambda content: zstd(content)[:-2]]
)


@settings(max_examples=NUM_CASES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(CONTENTS, st.sampled_from(ENDINGS), PACKED, st.sampled_from([None, None, "[:3]", "train[-2:]", "[10%:50%]"]))
def test_rows_in_are_pairs_out_and_rejects(
    pieces: PreferenceTokenizer, tmp_path: Path, content: bytes, ending: str, packed: Any, split: str | None
) -> None:
    path, prefix = tmp_path / f"a{ending}", tmp_path / "out"
    path.write_bytes(packed(content))
    options = PreprocessOptions((str(path),), "made here", str(prefix), split=split, chat_template="hh", overwrite=True)
    try:
        manifest = preprocess(options, pieces)
    except DataError:
        return
    counts = manifest.counts
    assert counts["rows"] == counts["kept"] + counts["rejected"] == sum(1 for _ in open_sources(str(path), split)[0])
    listed = Path(f"{prefix}.rejects.jsonl")
    assert counts["rejected"] == (len(listed.read_bytes().splitlines()) if listed.exists() else 0)
