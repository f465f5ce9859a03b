"""Preprocessing of whatever a file may hold: an answer in our own words, and no row lost.

Rows of any content in files that are whole, and files of any bytes. ``RMIPO_FUZZ_ROWS`` sets how many rows are tried.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_rmipo.data.encoding.tokenize import PreferenceTokenizer
from megatron_rmipo.data.layouts.formats import FORMATS
from megatron_rmipo.data.pair_store import PairStore
from megatron_rmipo.data.preparing.preprocess import PreprocessOptions, preprocess
from megatron_rmipo.data.reading.sources import open_sources
from megatron_rmipo.errors import DataError
from tests.data.reading.files import zstd

NUM_ROWS = int(os.environ.get("RMIPO_FUZZ_ROWS", "600"))
ROWS_PER_FILE = 20
COLUMNS = [
    *("prompt", "chosen", "rejected", "messages", "conversations", "completion", "response", "label", "system", "tools"),
    *("instruction", "input", "history", "rejected_response", "context", "documents", "chat_template_kwargs", "winner"),
    *("chosen_score", "rejected_score", "margin", "beta", "weight", "output_1", "output_2", "completions", "images", "id", ""),
]
ROLES = ["user", "assistant", "system", "tool", "human", "gpt", "USER", "developer", "observation", "function_call", "", "x"]

anything = st.characters(exclude_categories=())  # lone surrogates among them
words = st.text(anything, max_size=12) | st.sampled_from(
    ["Why?", "Because.", " ", "", "\n\nHuman: a\n\nAssistant: b", "<|eot_id|>", "{", "\ud83d"]
)
numbers = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2**70, 0.5])
nested = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.sampled_from(COLUMNS), inner, max_size=3),
    max_leaves=6,
)
parts = st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "image", "reasoning"]), "text": words}) | nested, max_size=2
)
calls = st.lists(
    st.fixed_dictionaries({"type": st.just("function"), "function": st.fixed_dictionaries({"name": words, "arguments": nested})})
    | nested,
    max_size=2,
)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES) | nested, "content": words | parts | nested},
    optional={
        "tool_calls": calls,
        "reasoning_content": words | nested,
        "from": st.sampled_from(ROLES),
        "value": words,
        "name": words,
    },
)
conversation = st.lists(message, max_size=4)
chat = st.tuples(st.just({"role": "user", "content": "Why?"}), message.map(lambda m: {**m, "role": "assistant"})).map(list)
value = words | conversation | chat | conversation.map(json.dumps) | nested
huge = st.sampled_from(["", "a" * 4_000, "\n" * 5_000, "\U0001f600" * 3_000])
row = st.one_of(
    st.fixed_dictionaries({"prompt": words, "chosen": words, "rejected": words}),
    st.fixed_dictionaries({"chosen": chat, "rejected": chat}),
    st.fixed_dictionaries({"prompt": value, "chosen": value, "rejected": value}, optional=dict.fromkeys(COLUMNS[3:], value)),
    st.dictionaries(st.sampled_from(COLUMNS) | words, value, max_size=6),
    st.fixed_dictionaries({"prompt": huge, "chosen": huge, "rejected": words}),
)


def as_line(drawn: tuple[Any, bool, int]) -> bytes:
    """A row as JSON, escaped or not, now and then cut short."""
    content, escaped, cut = drawn
    line = json.dumps(content, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    return line[: len(line) * cut // 8] if cut < 8 else line


lines = (
    st.tuples(row, st.booleans(), st.sampled_from([8] * 9 + [3])).map(as_line)
    | st.binary(max_size=20)
    | nested.map(lambda content: json.dumps(content).encode())
)


def as_json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode(errors="surrogatepass")


def as_cells(records: list[list[str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["prompt", "chosen", "rejected"], *records])
    return text.getvalue().encode(errors="surrogatepass")


ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".jsonl.gz", ".csv.zst")
ENCODINGS = ("utf-16", "utf-32", "utf-16-le", "gbk", "latin-1")
pair_rows = st.lists(st.fixed_dictionaries({"prompt": words, "chosen": words, "rejected": words}), max_size=4)
contents = st.one_of(
    st.tuples(st.lists(lines, max_size=6), st.sampled_from([b"\n", b"\r", b"\r\n"])).map(lambda drawn: drawn[1].join(drawn[0])),
    st.lists(st.lists(words, min_size=2, max_size=4), max_size=5).map(as_cells),
    st.tuples(pair_rows, st.sampled_from(ENCODINGS)).map(
        lambda drawn: "\n".join(json.dumps(row, ensure_ascii=False) for row in drawn[0]).encode(drawn[1], "replace")
    ),
    st.lists(row, max_size=4).map(as_json),
    nested.map(as_json),
    st.binary(max_size=60),
)
packers = st.sampled_from(
    [bytes, gzip.compress, zstd, lambda content: gzip.compress(content)[:-4], lambda content: zstd(content)[:-2]]
)
SETTINGS = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
good = json.dumps({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}).encode()


def pair_lines(kind: str) -> list[bytes]:
    """Rows to recognise a format by, so that what follows is judged row by row."""
    return [good] * ROWS_PER_FILE if kind == "recognised" else []


def counted(options: PreprocessOptions, tokenizer: PreferenceTokenizer) -> dict[str, int]:
    """Rows read, kept and listed; or that the file was refused, with the rows listed then."""
    prefix = Path(options.output_prefix)
    try:
        manifest = preprocess(options, tokenizer)
    except DataError:
        assert not prefix.with_suffix(".json").exists()
        return {"refused": 1, "listed": num_lines(prefix.with_suffix(".failed.rejects.jsonl"))}
    listed = num_lines(prefix.with_suffix(".rejects.jsonl"))
    return {"rows": manifest.counts["rows"], "kept": manifest.num_pairs, "listed": listed}


def num_lines(path: Path) -> int:
    """Rows listed in a file that may be absent."""
    return sum(1 for line in path.read_text(encoding="utf-8").split("\n") if line and json.loads(line)) if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["recognised", "as it is", "named"])
def test_whatever_a_file_holds_is_kept_or_listed(kind: str, byte_bpe: PreferenceTokenizer, tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()

    @settings(SETTINGS, max_examples=max(1, NUM_ROWS // ROWS_PER_FILE // 3))
    @given(st.lists(lines, min_size=ROWS_PER_FILE, max_size=ROWS_PER_FILE), st.sampled_from(sorted(FORMATS)))
    def check(drawn: list[bytes], row_format: str) -> None:
        drawn = [line.replace(b"\n", b" ").replace(b"\r", b" ") for line in drawn]
        source, prefix = tmp_path / "in.jsonl", tmp_path / "out"
        source.write_bytes(b"\n".join([*pair_lines(kind), *drawn]) + b"\n")
        options = PreprocessOptions(
            (str(source),), "", str(prefix), overwrite=True, format=row_format if kind == "named" else None, seq_length=64
        )
        for left in tmp_path.glob("out*"):
            left.unlink()
        counts = counted(options, byte_bpe)
        outcomes.update(counts)
        if "refused" not in counts:
            filled = sum(bool(line.strip()) for line in source.read_bytes().split(b"\n"))
            assert counts["rows"] == filled == counts["kept"] + counts["listed"]
            assert counts["kept"] == len(PairStore(str(prefix)))

    check()
    print(kind, dict(outcomes))
    assert outcomes["listed"] > 0


@settings(SETTINGS, max_examples=max(100, NUM_ROWS // ROWS_PER_FILE))
@given(contents, st.sampled_from(ENDINGS), packers, st.sampled_from([None, None, "[:3]", "train[-2:]", "[10%:50%]"]))
def test_any_bytes_are_refused_or_their_rows_kept_or_listed(
    pieces: PreferenceTokenizer, tmp_path: Path, content: bytes, ending: str, packed: Any, split: str | None
) -> None:
    path, prefix = tmp_path / f"a{ending}", tmp_path / "out"
    path.write_bytes(packed(content))
    for left in tmp_path.glob("out*"):
        left.unlink()
    counts = counted(PreprocessOptions((str(path),), "made here", str(prefix), split=split, chat_template="hh"), pieces)
    if "refused" not in counts:
        assert counts["rows"] == counts["kept"] + counts["listed"] == sum(1 for _ in open_sources(str(path), split)[0])
