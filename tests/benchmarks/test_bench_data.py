"""The data benchmark: made text, agreement before anything is timed, waits, steps and goals. How fast, a test does not ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import bench_data, loading, preparing
from benchmarks.inputs import step_costs
from benchmarks.loading import measure_loading, save_store, wait_share
from benchmarks.made_text import make_rows, save_rows, save_tokenizer
from megatron_rmipo.data.batches.batch_layout import BatchLayout
from megatron_rmipo.data.batches.order import PairOrder
from megatron_rmipo.data.batches.sizes import CostModel
from megatron_rmipo.data.encoding.chat import ChatTemplate
from megatron_rmipo.data.encoding.tokenize import PreferenceTokenizer, load_tokenizer
from megatron_rmipo.data.layouts.formats import FORMATS, recognise_format
from megatron_rmipo.data.layouts.reader import parse_row
from megatron_rmipo.data.preparing import preprocess as preparing_module
from megatron_rmipo.data.preparing.preprocess import PreprocessOptions, preprocess
from megatron_rmipo.data.store.chat_form import ChatForm
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.errors import DataError

SIZES = np.array([[33, 21, 17], [150, 5, 44], [9, 90, 7], [61, 61, 3], [20, 13, 13], [3, 2, 30], [71, 8, 29]])


def run(tmp_path: Path, *arguments: str) -> int:
    common = ["--csv", str(tmp_path / "a.csv"), "--json", "--repeats", "2", "--num-batches", "2", "--batch-size", "3"]
    return bench_data.main([*common, *arguments])


@pytest.fixture
def lengths(tmp_path: Path) -> Path:
    path = tmp_path / "lengths.jsonl"
    names = ("prompt_len", "chosen_len", "rejected_len")
    path.write_text("\n".join(json.dumps(dict(zip(names, sizes, strict=True))) for sizes in SIZES.tolist()))
    return path


@pytest.mark.parametrize(("source", "form"), [("hh", "hh"), ("ultrafeedback", "strings")])
def test_made_rows_are_rows_of_about_the_recorded_length(source: str, form: str, tmp_path: Path) -> None:
    sizes = np.tile(SIZES, (40, 1))
    rows = make_rows(source, sizes, seed=5)
    assert rows == make_rows(source, sizes, seed=5) != make_rows(source, sizes, seed=6)
    assert recognise_format(rows) == form
    save_tokenizer(tmp_path / "tokenizer", rows)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    assert tokenizer.info.eos_token_id is not None
    made = []
    for row in rows:
        pair = parse_row(row, FORMATS[form])
        prompt = sum(len(tokenizer.encode(turn.content)) for turn in pair.prompt)
        made.append([prompt, *(len(tokenizer.encode(response.content)) for response in pair.responses.values())])
    ratios = np.array(made).sum(axis=0) / sizes.sum(axis=0)
    assert ((ratios > 0.6) & (ratios < 1.5)).all(), ratios
    if form == "hh":
        assert {len(parse_row(row, FORMATS[form]).prompt) for row in rows} >= {1, 3, 5}


def test_figures_of_preparing_are_those_of_the_data_set(
    lengths: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stores: list[PairStore] = []
    original, original_form = preparing.preprocess, preparing_module.chat_form
    carried: list[int] = []

    def kept(*arguments: Any) -> Any:
        manifest = original(*arguments)
        stores.append(PairStore(arguments[0].output_prefix))
        return manifest

    def counted(template: ChatTemplate, tokenizer: PreferenceTokenizer, *, official: bool) -> ChatForm | None:
        calls = getattr(tokenizer.backend, "calls", [])
        num_before = len(calls)
        form = original_form(template, tokenizer, official=official)
        carried.append(sum(len(one) for _, _, ids in calls[num_before:] for one in ids))
        return form

    monkeypatch.setattr(preparing, "preprocess", kept)
    monkeypatch.setattr(preparing_module, "chat_form", counted)
    assert run(tmp_path, "--lengths", str(lengths), "--parts", "preparing") == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert len(stores) == 3  # once to look, twice to time
    assert (row["part"], row["source"], row["pairs"], row["seq_length"]) == ("preparing", str(lengths), 7, 2048)
    assert row["tokens"] == stores[0].lengths.sum()
    # Encoded as rendered: the template writes BOS and the end of each answer itself. Twice its end, to learn of it, and
    # a turn or two for the form that the data hand on.
    assert carried[0] > 0
    assert row["encoded"] == row["tokens"] + 2 + looked_at_twice(stores[0]) + carried[0]
    assert row["share_p50"] > 0
    assert row["fast_share_p20"] <= row["fast_share_p50"] <= row["fast_share_p80"]


def looked_at_twice(store: PairStore) -> int:
    """Tokens of responses so short that they may be markup alone: encoded once more without it."""
    responses = store.lengths[:, 1:]
    return int((responses[responses <= 4] - 1).sum())


def test_rows_and_a_tokenizer_of_ones_own(
    lengths: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows("hh", SIZES, seed=5)
    save_rows(tmp_path / "rows.jsonl", [*rows, {"chosen": "x", "rejected": "y"}])
    save_tokenizer(tmp_path / "tokenizer", rows)
    flags = ["--input", str(tmp_path / "rows.jsonl"), "--tokenizer", str(tmp_path / "tokenizer"), "--chat-template", "hh"]
    assert run(tmp_path, *flags, "--lengths", str(lengths), "--parts", "preparing") == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["source"], row["pairs"], row["chat_template"]) == (str(tmp_path / "rows.jsonl"), 7, "hh")
    preprocess(PreprocessOptions((flags[1],), flags[3], str(tmp_path / "pairs"), chat_template="hh"))
    assert row["tokens"] == PairStore(tmp_path / "pairs").lengths.sum()
    with pytest.raises(SystemExit):
        bench_data.parse_options(flags[:2])
    monkeypatch.setattr(bench_data, "load_tokenizer", lambda _name: load_piece(tmp_path))
    with pytest.raises(DataError, match=r"bare sentencepiece model\. Give a directory"):
        run(tmp_path, *flags, "--parts", "preparing")


def load_piece(tmp_path: Path) -> Any:
    from tests.data.tokenizers import save_sentencepiece

    return load_tokenizer(str(save_sentencepiece(tmp_path / "small.model")))


@pytest.mark.parametrize("name", ["first", "continuation"])
def test_what_the_tokenizer_alone_does_not_confirm_is_not_measured(
    name: str, lengths: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(self: preparing.Recorder, method: str, texts: Any) -> Any:
        ids = original(self, method, texts)
        if method == name:
            self.calls[-1][2][-1][-1] ^= 1
        return ids

    original = preparing.Recorder._encode
    monkeypatch.setattr(preparing.Recorder, "_encode", wrong)
    with pytest.raises(AssertionError, match=f"encodes other tokens than preprocessing did: {name}"):
        run(tmp_path, "--lengths", str(lengths), "--parts", "preparing")


def test_the_first_wait_and_step_do_not_count() -> None:
    assert wait_share([50.0, 1.0, 3.0], [7.0, 20.0, 56.0]) == 4 / 80


def test_a_step_lasts_as_long_as_its_flops_take_at_the_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(loading.time, "sleep", slept.append)
    monkeypatch.setattr(loading, "peak_flops", lambda _device, _dtype: 1e9)
    cost = CostModel(7e5, 11.0, 3e5)
    monkeypatch.setattr(loading, "forward_cost_model", lambda _architecture: cost)
    store = save_store(tmp_path / "store", SIZES, seed=4)
    assert store.lengths.tolist() == SIZES.tolist()
    options = bench_data.parse_options(
        ["--batch-size", "3", "--num-batches", "4", "--ranks", "2", "--num-workers", "0", "--seed", "9"]
    )
    result = measure_loading("mine", store, options)
    order = PairOrder(7, 9)
    layout = BatchLayout(0, 2, 8192, cost, unconditional="bos", bos_token_id=1)
    expected = [step_costs(SIZES[order.batch(3 * n, 3, 15)], layout).sum() / (2 * 1e9) for n in range(5)]
    assert slept == pytest.approx(expected)
    assert result.step_ms.p50 == pytest.approx(1e3 * np.median(expected))
    assert (result.source, result.ranks, result.num_workers) == ("mine", 2, 0)


def test_goals_are_held(
    lengths: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_data, "LEAST_SHARE_OF_BARE_SPEED", 0.0)
    monkeypatch.setattr(bench_data, "MOST_WAIT_SHARE", 1.0)
    monkeypatch.setattr(loading.time, "sleep", lambda _seconds: None)
    assert run(tmp_path, "--lengths", str(lengths), "--check") == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["part"] for row in report["rows"]] == ["preparing", "loading"]
    assert [goal["name"].split(",")[0] for goal in report["goals"]] == ["preparing"] * 2  # no batches of 128 pairs
    assert run(tmp_path, "--lengths", str(lengths), "--batch-size", "128", "--parts", "loading", "--check") == 0
    (goal,) = json.loads(capsys.readouterr().out)["goals"]
    assert (goal["name"], goal["limit"]) == (f"loading, {lengths}: share of time waited", 1.0)
    monkeypatch.setattr(bench_data, "LEAST_SHARE_OF_BARE_SPEED", 1e6)
    assert run(tmp_path, "--lengths", str(lengths), "--parts", "preparing", "--check") == 1
    assert "goal missed: preparing, lengths.jsonl: share of the speed of encode_batch" in capsys.readouterr().err
    assert (
        run(tmp_path, "--lengths", str(lengths), "--batch-size", "128", "--num-workers", "0", "--parts", "loading", "--check")
        == 1
    )
    assert "no goal is set" in capsys.readouterr().err
