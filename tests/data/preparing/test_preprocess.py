from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rmipo.data.encoding.tokenize import PreferenceTokenizer
from megatron_rmipo.data.preparing.inspect_cli import describe_store
from megatron_rmipo.data.preparing.preprocess import PreprocessOptions, preprocess
from megatron_rmipo.data.store.manifest import Manifest
from megatron_rmipo.data.store.pair_store import PairStore, PairStoreWriter
from tests.data.reading.files import KINDS, write

ENDINGS = ("bin", "idx", "json", "rejects.jsonl")


def rows(count: int) -> list[dict[str, Any]]:
    """Rows of which every third cannot be used."""
    made: list[dict[str, Any]] = []
    for n in range(count):
        row = {"prompt": f"Why {n}?" * (n % 5 + 1), "chosen": f"So {n}.", "rejected": "No,\nno."}
        unusable: dict[str, Any] = {"rejected": row["chosen"]} if n % 2 else {"chosen": None}
        made.append(row | (unusable if n % 3 == 2 else {}))
    return made


def prepare(tokenizer: PreferenceTokenizer, prefix: Path, *inputs: Path, **options: Any) -> Manifest:
    settings: dict[str, Any] = {"chat_template": "hh", **options}
    names = tuple(map(str, inputs))
    return preprocess(PreprocessOptions(names, "made-here", str(prefix), **settings), tokenizer)


def contents(prefix: Path) -> dict[str, bytes]:
    return {ending: Path(f"{prefix}.{ending}").read_bytes() for ending in ENDINGS}


def test_rows_of_every_kind_of_file_are_pairs_or_rejects(pieces: PreferenceTokenizer, tmp_path: Path) -> None:
    expected = None
    for name in KINDS:
        prefix = tmp_path / "out" / name
        counts = prepare(pieces, prefix, write(tmp_path, name, rows(11))).counts
        assert counts["rows"] == counts["kept"] + counts["rejected"] == 11, name
        rejects = [json.loads(line) for line in Path(f"{prefix}.rejects.jsonl").read_text().splitlines()]
        found = (
            Path(f"{prefix}.bin").read_bytes(),
            [(reject["number"], reject["reason"], reject["field"]) for reject in rejects],
        )
        expected = expected or found
        assert found == expected, name
    assert expected is not None
    assert expected[1] == [(3, "missing_field", "chosen"), (6, "identical", "rejected"), (9, "missing_field", "chosen")]


def test_what_no_kind_of_file_can_hold_whole_is_counted(pieces: PreferenceTokenizer, tmp_path: Path) -> None:
    good = json.dumps(rows(1)[0]).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, b'{"prompt": "\xe9 "}', b"", b"[", good, b"null", good]))
    (tmp_path / "b.csv").write_bytes(b'prompt,chosen,rejected\na,b,c\na,b\n\na,"b\n\n",c,d\na,\xe9,c\na,b,c\n')
    counts = prepare(pieces, tmp_path / "out", tmp_path).counts
    assert counts["rows"] == counts["kept"] + counts["rejected"]
    assert (counts["kept"], counts["rejected/not_utf8"], counts["rejected/malformed"]) == (5, 2, 4)
    rejects = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").read_text().splitlines()]
    assert [(Path(r["source"]).name, r["unit"], r["number"]) for r in rejects] == [
        ("a.jsonl", "line", 2),
        ("a.jsonl", "line", 4),
        ("a.jsonl", "line", 6),
        ("b.csv", "row", 2),
        ("b.csv", "row", 3),
        ("b.csv", "row", 4),
    ]


def test_a_part_of_a_split_is_prepared_and_recorded(pieces: PreferenceTokenizer, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", "a.csv", rows(11)).rename(tmp_path / "data" / "train-00000-of-00002.csv")
    write(tmp_path / "data", "a.parquet", rows(11)).rename(tmp_path / "data" / "train-00001-of-00002.parquet")
    write(tmp_path / "data", "a.jsonl", rows(4)).rename(tmp_path / "data" / "test.jsonl")
    manifest = prepare(pieces, tmp_path / "out", tmp_path / "data", split="train[9:13]")
    assert manifest.counts["rows"] == 4
    assert [(Path(source["name"]).name, source["rows"]) for source in manifest.sources] == [
        ("train-00000-of-00002.csv", [9, 11]),
        ("train-00001-of-00002.parquet", [0, 2]),
    ]
    assert "train-00000-of-00002.csv[9, 11], " in describe_store(PairStore(tmp_path / "out"))


def killed(function: Callable[[], object], owner: Any, name: str, call: int) -> int:
    """Run a function in a process that is killed before the n-th call of ``owner.name``; the signal that ended it."""
    child = os.fork()
    if child == 0:
        original, calls = getattr(owner, name), iter(range(call))

        def counted(*args: Any, **options: Any) -> Any:
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        setattr(owner, name, counted)
        try:
            function()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def test_a_run_killed_anywhere_and_started_again_gives_the_same_bytes(pieces: PreferenceTokenizer, tmp_path: Path) -> None:
    source, other = write(tmp_path, "a.csv", rows(300)), write(tmp_path, "a.jsonl", rows(20))
    prepare(pieces, tmp_path / "whole", source)
    expected = contents(tmp_path / "whole")
    moments = [(PairStoreWriter, "add_all", 0), (PairStoreWriter, "add_all", 2), (os, "fsync", 0)]
    moments += [(os, "replace", call) for call in range(4)]
    for number, (owner, name, call) in enumerate(moments):
        prefix = tmp_path / f"out{number}"
        replaces = number % 2 == 1  # a data set that stands there already
        if replaces:
            prepare(pieces, prefix, other)
        run = functools.partial(prepare, pieces, prefix, source, overwrite=replaces)
        assert killed(run, owner, name, call) == signal.SIGKILL, (name, call)
        run()
        assert contents(prefix) == expected, (name, call)
        assert not list(tmp_path.glob(f"out{number}.incomplete*"))
