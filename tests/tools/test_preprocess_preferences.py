from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_rmipo.data.encoding.tokenize import PreferenceTokenizer
from megatron_rmipo.data.preparing.preprocess import PreprocessOptions, preprocess
from megatron_rmipo.data.preparing.preprocess_cli import main
from megatron_rmipo.data.store.pair_store import PairStore
from tests.data.tokenizers import TEXTS, save_byte_bpe, save_sentencepiece, shared_data

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "preprocess_preferences.py"
WORDS = " ".join(TEXTS).split()


def rows(count: int) -> list[dict[str, object]]:
    """Rows of odd lengths; every seventh cannot be used."""
    made: list[dict[str, object]] = []
    for i in range(count):
        words = WORDS[i % 13 :]
        row: dict[str, object] = {
            "prompt": " ".join(words[: 3 + i % 11]),
            "chosen": f"{i} is odd",
            "rejected": " ".join(words[: i % 17 + 1]),
        }
        made.append({**row, "rejected": [None, 7, "", row["chosen"]][i // 7 % 4]} if i % 7 == 0 else row)
    return made


def write_rows(path: Path, content: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sentencepiece(tmp_path_factory.mktemp("model") / "small.model")


def run(tmp_path: Path, model: Path, source: Path, *flags: str, prefix: str = "out") -> int:
    base = ["--input", str(source), "--tokenizer-model", str(model), "--output-prefix", str(tmp_path / prefix)]
    return main([*base, *([] if "--chat-template" in flags else ["--chat-template", "mistral"]), *flags])


def test_rows_become_pairs_and_rejects_are_listed(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = rows(30)
    source = write_rows(tmp_path / "rows.jsonl", content)
    source.write_text(source.read_text() + '{"prompt": "cut off\n')
    assert run(tmp_path, model, source) == 0
    store = PairStore(tmp_path / "out")
    rejects = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").read_text().splitlines()]
    assert len(store) == 25
    assert [(reject["number"], reject["reason"], reject["field"]) for reject in rejects] == [
        (1, "missing_field", "rejected"),
        (8, "not_text", "rejected"),
        (15, "empty_response", "rejected"),
        (22, "identical", "rejected"),
        (29, "missing_field", "rejected"),
        (31, "malformed", ""),
    ]
    counts = store.manifest.counts
    assert (counts["rows"], counts["kept"], counts["rejected"], counts["rejected/missing_field"]) == (31, 25, 6, 2)
    assert store.manifest.format == "strings"
    tokenizer = load(model)
    usable = [row for i, row in enumerate(content) if i % 7]
    for index, row in enumerate(usable):
        prompt, chosen = tokenizer.encode_rendered(f"[INST] {row['prompt']} [/INST]", f" {row['chosen']} </s>")
        assert (store[index].prompt.tolist(), store[index].chosen.tolist()) == (prompt, chosen)
    out = capsys.readouterr().out
    assert "25 pairs" in out
    assert "rejected 6: 1 empty_response, 1 identical, 1 malformed, 2 missing_field, 1 not_text" in out


def test_one_json_document_named_lines_is_read_with_a_note(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps(rows(9), indent=1))
    assert run(tmp_path, model, source) == 0
    captured = capsys.readouterr()
    assert f"note: {source}: not one object a line" in captured.err
    assert "7 pairs" in captured.out
    source.write_bytes(source.read_text().encode("utf-16-le"))
    assert run(tmp_path, model, source, "--overwrite") == 1
    assert f"error: {source}: the file is not UTF-8 but UTF-16LE" in capsys.readouterr().err
    assert len(PairStore(tmp_path / "out")) == 7


def load(model: Path) -> PreferenceTokenizer:
    from megatron_rmipo.data.encoding.tokenize import load_tokenizer

    return load_tokenizer(str(model))


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_workers(tmp_path: Path) -> None:
    directory = save_byte_bpe(tmp_path / "tokenizer")
    source = write_rows(tmp_path / "rows.jsonl", rows(700))
    for workers in ("1", "3"):
        flags = ("--workers", workers, "--chat-template", "llama3", "--seq-length", "60")
        assert run(tmp_path, directory, source, *flags, prefix=f"w{workers}") == 0
    for ending in ("bin", "idx", "json", "rejects.jsonl"):
        assert (tmp_path / f"w1.{ending}").read_bytes() == (tmp_path / f"w3.{ending}").read_bytes()


def test_a_tokenizer_that_is_loaded_already_is_taken(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_rows(tmp_path / "rows.jsonl", rows(20))
    assert run(tmp_path, model, source) == 0
    tokenizer = load(model)
    monkeypatch.setattr("megatron_rmipo.data.preparing.preprocess.load_tokenizer", None)
    prefix = str(tmp_path / "again")
    preprocess(PreprocessOptions((str(source),), str(model), prefix, chat_template="mistral"), tokenizer)
    for ending in ("bin", "idx", "json", "rejects.jsonl"):
        assert (tmp_path / f"again.{ending}").read_bytes() == (tmp_path / f"out.{ending}").read_bytes()


def test_several_inputs_stand_in_their_order(tmp_path: Path, model: Path) -> None:
    first = write_rows(tmp_path / "a.jsonl", rows(7))
    second = write_rows(tmp_path / "b.jsonl", rows(14)[7:])
    assert run(tmp_path, model, first, "--input", str(first), str(second)) == 0
    assert run(tmp_path, model, write_rows(tmp_path / "both.jsonl", rows(14)), prefix="both") == 0
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "both.bin").read_bytes()


def test_columns_and_format_are_named(tmp_path: Path, model: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"question": "Why?", "answers": {"good": "So.", "bad": "No."}}])
    columns = "prompt=question,chosen=answers.good,rejected=answers.bad"
    assert run(tmp_path, model, source, "--columns", columns, "--format", "strings") == 0
    assert len(PairStore(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--chat-template", "mistrall"), "not a readable file"),
        (("--seq-length", "8"), "no row could be used: 10 rows rejected"),
        (("--seq-length", "12", "--overlong", "error"), "Raise --seq-length"),
        (("--overlong", "official"), "needs --max-prompt-length"),
        (("--seq-length", "12", "--overlong", "error"), "rows.jsonl: line "),
        (("--strict",), "--strict: 2 rows rejected (1 missing_field, 1 not_text)"),
        (("--columns", "question=prompt"), "--columns: 'question=prompt'"),
        (("--columns", "prompt=absent"), "no such column. The rows have: prompt, chosen, rejected"),
        (("--split", "train"), "is a file and has no splits"),
        (("--workers", "0"), "--workers 0"),
        (("--format", "hh"), "no row could be used"),
    ],
)
def test_a_mistake_is_one_message_and_leaves_no_data_set(
    flags: tuple[str, ...], message: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", rows(10))
    assert run(tmp_path, model, source, *flags) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") < 15
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out") and path.name != "out.failed.rejects.jsonl"]


def test_what_stands_at_the_prefix_is_kept(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_rows(tmp_path / "rows.jsonl", rows(10))
    assert run(tmp_path, model, source) == 0
    before = (tmp_path / "out.bin").read_bytes()
    assert run(tmp_path, model, write_rows(tmp_path / "rows.jsonl", rows(20))) == 1
    assert "Pass --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out.bin").read_bytes() == before
    assert run(tmp_path, model, source, "--overwrite") == 0
    assert (tmp_path / "out.bin").read_bytes() != before


@pytest.mark.parametrize("flags", [(), ("--overlong", "official", "--max-prompt-length", "60"), ("--format", "supervised")])
def test_supervised_rows_are_pairs_without_a_rejected_response(
    flags: tuple[str, ...], tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [row for i, row in enumerate(rows(20)) if i % 7]
    content: list[dict[str, object]] = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    content += [{"messages": [*turns, {"role": "user", "content": "Is it </s>?"}, {"role": "assistant", "content": "No.</s>"}]}]
    content += [pairs[0], {"messages": turns[:1]}, {"prompt": "Why?", "response": " "}]
    assert run(tmp_path, model, write_rows(tmp_path / "rows.jsonl", content), *flags) == 0
    assert "18 supervised rows," in capsys.readouterr().out
    length_flags = () if "--format" in flags else flags
    assert run(tmp_path, model, write_rows(tmp_path / "pairs.jsonl", pairs), *length_flags, prefix="pairs") == 0
    store, with_rejected = PairStore(tmp_path / "out"), PairStore(tmp_path / "pairs")
    assert (store.manifest.has_rejected, with_rejected.manifest.has_rejected) == (False, True)
    assert store.manifest.format == "supervised"
    assert store.lengths[:, 2].tolist() == [0] * 18
    assert len(with_rejected) == 17
    for index in range(17):  # the same ids as in a pair
        assert store[index].prompt.tolist() == with_rejected[index].prompt.tolist()
        assert store[index].chosen.tolist() == with_rejected[index].chosen.tolist()
    rejects = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").read_text().splitlines()]
    assert [(r["number"], r["reason"], r["field"]) for r in rejects] == [
        (19, "mixed", "rejected"),
        (20, "bad_turns", "messages"),
        (21, "empty_response", "response"),
    ]


def test_supervised_rows_are_shortened_like_pairs(tmp_path: Path, model: Path) -> None:
    content: list[dict[str, object]] = [
        {"prompt": " ".join(WORDS), "response": "So it is."},
        {"prompt": "Why?", "response": "So."},
    ]
    source = write_rows(tmp_path / "rows.jsonl", content)
    assert run(tmp_path, model, source, "--seq-length", "70") == 0
    store = PairStore(tmp_path / "out")
    assert store.manifest.counts["truncated"] == 1
    assert 60 < store.lengths[0].sum() <= 70
    assert store.manifest.lengths["total"]["max"] == store.lengths[0].sum()


@pytest.mark.parametrize("flags", [(), ("--overlong", "official", "--max-prompt-length", "60"), ("--format", "unpaired")])
def test_unpaired_rows_are_pairs_without_one_response(
    flags: tuple[str, ...], tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [row for i, row in enumerate(rows(20)) if i % 7]
    content: list[dict[str, object]] = []
    for i, row in enumerate(pairs):
        label = i % 3 == 0
        content.append({"prompt": row["prompt"], "completion": row["chosen" if label else "rejected"], "label": label})
    turns = [{"role": "user", "content": "Is it </s>?"}, {"role": "assistant", "content": "No.</s>"}]
    content += [{"messages": turns, "label": False}, {"prompt": "Why?", "response": "So.", "label": 1}]
    content += [pairs[0], {"prompt": "Why?", "response": "So."}, {"prompt": "Why?", "response": "So.", "label": "bad"}]
    content += [{"prompt": "Why?", "completion": " ", "label": False}]
    assert run(tmp_path, model, write_rows(tmp_path / "rows.jsonl", content), *flags) == 0
    out = capsys.readouterr().out
    assert "19 unpaired rows," in out
    assert "  7 desirable (label true), 12 undesirable (label false)\n" in out
    length_flags = () if "--format" in flags else flags
    assert run(tmp_path, model, write_rows(tmp_path / "pairs.jsonl", pairs), *length_flags, prefix="pairs") == 0
    store, with_both = PairStore(tmp_path / "out"), PairStore(tmp_path / "pairs")
    assert (store.manifest.unpaired, with_both.manifest.unpaired, store.manifest.format) == (True, False, "unpaired")
    assert (store.manifest.counts["desirable"], store.manifest.counts["undesirable"]) == (7, 12)
    assert "desirable" not in with_both.manifest.counts
    for index in range(17):  # the same ids as in a pair
        side, other = ("chosen", "rejected") if index % 3 == 0 else ("rejected", "chosen")
        assert store[index].prompt.tolist() == with_both[index].prompt.tolist()
        assert getattr(store[index], side).tolist() == getattr(with_both[index], side).tolist()
        assert getattr(store[index], other).size == 0
    assert [(part > 0).tolist() for part in store.lengths[17:, 1:]] == [[False, True], [True, False]]
    rejects = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").read_text().splitlines()]
    assert [(r["number"], r["reason"], r["field"]) for r in rejects] == [
        (20, "mixed", "rejected"),
        (21, "missing_field", "label"),
        (22, "bad_label", "label"),
        (23, "empty_response", "response"),
    ]
    assert rejects[2]["message"].startswith("true/false, yes/no, 1/0 or 1/-1 expected, found str 'bad'; --ignore-columns label")


def test_the_column_of_labels_is_named(tmp_path: Path, model: Path) -> None:
    content: list[dict[str, object]] = [
        {"q": "Why?", "a": "So.", "thumbs": {"up": True}},
        {"q": "Why?", "a": "No.", "thumbs": {"up": 0}},
    ]
    source = write_rows(tmp_path / "rows.jsonl", content)
    assert run(tmp_path, model, source, "--columns", "prompt=q,completion=a,label=thumbs.up") == 0
    store = PairStore(tmp_path / "out")
    assert (store.manifest.format, (store.lengths[:, 1:] > 0).tolist()) == ("unpaired", [[True, False], [False, True]])


def test_a_labelled_row_among_others_is_rejected(tmp_path: Path, model: Path) -> None:
    labelled: dict[str, object] = {"prompt": "Why?", "completion": "So.", "label": False}
    supervised: list[dict[str, object]] = [{"prompt": "Why?", "completion": "So."}, {"prompt": "Why?", "completion": "No."}]
    for name, others, field in (("pairs", rows(3)[1:], "chosen"), ("supervised", supervised, "label")):
        source = write_rows(tmp_path / f"{name}.jsonl", [labelled, *others])
        assert run(tmp_path, model, source, prefix=name) == 0
        (reject,) = (tmp_path / f"{name}.rejects.jsonl").read_text().splitlines()
        assert (json.loads(reject)["reason"], json.loads(reject)["field"]) == ("mixed", field)
        assert (len(PairStore(tmp_path / name)), PairStore(tmp_path / name).manifest.unpaired) == (2, False)


def test_a_supervised_row_among_pairs_is_rejected(tmp_path: Path, model: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Why?", "completion": "So."}, *rows(3)[1:]])
    assert run(tmp_path, model, source) == 0
    store = PairStore(tmp_path / "out")
    assert (len(store), store.manifest.has_rejected, store.manifest.counts["rejected/mixed"]) == (2, True, 1)


def test_unread_columns_and_inverted_pairs_are_told(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = [
        {"prompt": f"Why {i}?", "chosen": "So.", "rejected": "No.", "chosen_score": i, "rejected_score": 2} for i in range(5)
    ]
    source = write_rows(
        tmp_path / "rows.jsonl", [{**row, "id": 7, "seen": None} for row in content] * 50 + [{**content[4], "late": 1}]
    )
    for workers in ("1", "2"):
        assert run(tmp_path, model, source, "--workers", workers, prefix=f"w{workers}") == 0
        told, noted = capsys.readouterr()
        manifest = PairStore(tmp_path / f"w{workers}").manifest
        assert (manifest.counts["inverted"], manifest.counts["rejected/tied"], manifest.unread_columns) == (
            100,
            50,
            ["id", "late"],
        )
        assert "100 with a chosen answer that scores lower than the rejected one: kept" in told
        assert "  not read: id, late" in told
        notes = [line.partition(". ")[0] for line in noted.splitlines() if line.startswith("note: ")]
        assert notes == ["note: not read by format strings: id", "note: not read by format strings: late"]
    swapped = ("--on-inverted", "swap", "--ignore-columns", "id")
    assert run(tmp_path, model, source, *swapped, prefix="swapped") == 0
    assert "answers swapped" in capsys.readouterr().out
    kept, other = (PairStore(tmp_path / name) for name in ("w1", "swapped"))
    assert (kept[0].chosen.tolist(), kept[0].rejected.tolist()) == (other[0].rejected.tolist(), other[0].chosen.tolist())
    assert run(tmp_path, model, source, "--on-inverted", "error", prefix="stopped") == 1
    assert "chosen_score is 0, rejected_score 2 [inverted]" in capsys.readouterr().err
    assert run(tmp_path, model, write_rows(tmp_path / "more.jsonl", [{**content[4], "input": "x"}]), prefix="more") == 1
    assert "--ignore-columns input" in capsys.readouterr().err


def test_what_is_no_object_is_rejected_by_its_number(tmp_path: Path, model: Path) -> None:
    source = tmp_path / "rows.json"
    source.write_text(json.dumps([None, 5, rows(2)[1], [1], None]))
    assert run(tmp_path, model, source) == 0
    rejects = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").read_text().splitlines()]
    assert [(r["number"], r["reason"], r["excerpt"]) for r in rejects] == [
        (number, "malformed", text) for number, text in ((1, "null"), (2, "5"), (4, "[1]"), (5, "null"))
    ]
    assert "found null" in rejects[0]["message"]
    assert PairStore(tmp_path / "out").manifest.counts["rows"] == 5


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_half_a_surrogate_pair_is_rejected(ending: str, tmp_path: Path, model: Path) -> None:
    good = rows(2)[1]
    bad = [{**good, "chosen": "half \ud83d"}, {**good, "prompt": None, "\ud83d": 1}]
    source = write_rows(tmp_path / "rows.jsonl", [good, *bad])
    if ending == "json":
        source = tmp_path / "rows.json"
        source.write_text(json.dumps([good, *bad]))
    assert run(tmp_path, model, source) == 0
    rejects = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(r["number"], r["reason"], r["field"]) for r in rejects] == [
        (2, "not_encodable", "chosen"),
        (3, "missing_field", "prompt"),
    ]
    assert "character 6" in rejects[0]["message"]


def test_a_failed_replacement_leaves_the_earlier_list(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, model, write_rows(tmp_path / "rows.jsonl", rows(10))) == 0
    earlier = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name.startswith("out")}
    source = write_rows(tmp_path / "rows.jsonl", rows(30))

    def left() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name.startswith("out")}

    with monkeypatch.context() as patched:
        patched.setattr("megatron_rmipo.data.store.pair_store._flush_to_disk", lambda _path: os.write(-1, b""))
        assert run(tmp_path, model, source, "--overwrite") == 1
    assert left() == earlier
    assert run(tmp_path, model, source, "--overwrite", "--strict") == 1
    assert "All are listed in" in capsys.readouterr().err
    failed = left().pop("out.failed.rejects.jsonl")
    assert failed.count(b"\n") == 5
    assert {name: content for name, content in left().items() if "failed" not in name} == earlier
    assert run(tmp_path, model, source, "--overwrite") == 0
    assert (tmp_path / "out.rejects.jsonl").read_bytes() == failed
    assert not (tmp_path / "out.failed.rejects.jsonl").exists()


def test_a_disk_that_fills_up_with_rejects_is_one_message(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.StringIO):
        def close(self) -> None:
            if not self.closed:
                super().close()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("megatron_rmipo.data.preparing.rejects.open", lambda *_args, **_options: Full(), raising=False)
    assert run(tmp_path, model, write_rows(tmp_path / "rows.jsonl", rows(10))) == 1
    shown = capsys.readouterr().err
    assert "out.incomplete.rejects.jsonl: could not be written (No space left on device). Free some space" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_rejects_of_an_earlier_run_do_not_stay(tmp_path: Path, model: Path) -> None:
    assert run(tmp_path, model, write_rows(tmp_path / "rows.jsonl", rows(10))) == 0
    assert (tmp_path / "out.rejects.jsonl").exists()
    assert run(tmp_path, model, write_rows(tmp_path / "rows.jsonl", rows(7)[1:]), "--overwrite") == 0
    assert not (tmp_path / "out.rejects.jsonl").exists()


def test_progress_lines_come_at_the_interval(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, model, write_rows(tmp_path / "rows.jsonl", rows(300)), "--log-interval", "100") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "rows/s" in line]
    assert [line.split(",")[0] for line in lines] == ["128 of 300 rows", "256 of 300 rows", "300 of 300 rows"]


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_looks_complete(tmp_path: Path, model: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", rows(7)[1:] * 40_000)
    command = [
        sys.executable,
        str(SCRIPT),
        "--input",
        str(source),
        "--tokenizer-model",
        str(model),
        "--output-prefix",
        str(tmp_path / "out"),
    ]
    process = subprocess.Popen(
        [*command, "--chat-template", "mistral"], env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
    )
    partial = tmp_path / "out.incomplete.bin"
    deadline = time.monotonic() + 120
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert partial.stat().st_size > 0
    assert not [path for path in tmp_path.iterdir() if path.name in ("out.bin", "out.idx", "out.json")]


def test_the_script_shows_its_help() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True, env=environment)
    for flag in ("--input", "--tokenizer-model", "--output-prefix", "--workers", "--seq-length", "--overlong", "--strict"):
        assert flag in done.stdout


@pytest.mark.skipif(not shared_data().is_dir(), reason="no shared data")
def test_ultrafeedback_keeps_what_can_be_used(tmp_path: Path) -> None:
    model = shared_data() / "tokenizers" / "mistral-v1.model"
    assert run(tmp_path, model, shared_data() / "ultrafeedback" / "train.jsonl", "--seq-length", "1024") == 0
    store = PairStore(tmp_path / "out")
    counts = store.manifest.counts
    assert counts["rows"] == 1000
    assert counts["kept"] + counts["rejected"] == 1000
    assert counts["rejected/empty_response"] == 2
    assert counts["rejected/tied"] == 111
    rejects = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").read_text().splitlines()]
    assert [reject["number"] - 1 for reject in rejects if reject["reason"] == "empty_response"] == [478, 833]
    assert (store.lengths[:, 0] + store.lengths[:, 1:].max(axis=1)).max() <= 1024
    for index in range(len(store)):
        pair = store[index]
        assert (pair.prompt[0], (pair.prompt == 1).sum()) == (1, 1)
        for response in (pair.chosen, pair.rejected):
            assert (response[-1], (response == 2).sum()) == (2, 1)
