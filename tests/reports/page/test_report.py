"""What a report shows of a run, of several, and of one that has left less than it should."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_rmipo.evaluation_file import Evaluation, EvaluationTable, write_evaluation
from megatron_rmipo.reports.page.cli import main
from megatron_rmipo.reports.page.report import write_report
from tests.reports.page.runs import (
    eval_record,
    pair_values,
    train_record,
    write_lines,
    write_page_run,
    write_page_tokens,
)

MARKUP = "<script>alert('x')</script>"


class Page(HTMLParser):
    """The ids of a page, where its links go, its text by section, and whether its elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sections: dict[str, str] = {}
        self.addresses: list[str] = []
        self._open: list[tuple[str, str]] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        named = dict(attrs)
        self.ids += [named["id"]] if "id" in named else []
        self.links += [named["href"]] if tag == "a" else []
        self.addresses += [value for name, value in attrs if name in ("src", "href") and tag != "a"]
        if tag not in ("meta", "link", "br", "input", "path", "line", "circle"):
            self._open.append((tag, named.get("id", "")))

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag
        self.handle_data(" ")

    def handle_data(self, data: str) -> None:
        if any(tag in ("script", "style") for tag, _ in self._open):
            return
        for tag, name in self._open:
            if tag == "section" and name:
                self.sections[name] = self.sections.get(name, "") + data

    def text(self, section: str) -> str:
        return " ".join(self.sections[section].split())


def page_of(*runs: Path, evaluations: tuple[Path, ...] = ()) -> Page:
    output = runs[0] / "report.html"
    write_report(runs, output, evaluations)
    return Page(output.read_text(encoding="utf-8"))


def test_a_run_is_shown_from_its_summary_to_what_to_do_next(tmp_path: Path) -> None:
    facts = {
        "commit": "0123abc with changes",
        "versions": {"torch": "2.13.0", "apex": None},
        "layout": "2 ranks (TP 2 x PP 1 x DP 1)",
        "starts": [{"time": "2026-01-02T03:04:05+00:00", "step": 0, "command": "torchrun -m megatron_rmipo.train --lr 1"}],
        "data": {
            "train": {
                "pairs": 4321,
                "sets": [
                    {"prefix": "data/pairs", "num_pairs": 4321, "counts": {"rows": 5000, "kept": 4321, "rejected/empty": 679}}
                ],
                "histograms": {"step": 10, "counted": 4321, "prompt": [1, 0, 5], "chosen": [0, 7, 2]},
            }
        },
    }
    logs = write_page_run(tmp_path / "run", flags=["--lr", "2e-5"], facts=facts)
    write_page_tokens(logs, {"prompt": "Why?", "chosen": "Yes" + MARKUP, "rejected": "No" * 400})
    page = page_of(logs)
    assert "held-out accuracy 0.800 \u00b1 0.052 0.400 \u00b1 0.063 before" in page.text("summary")
    assert "rose from 0.400 to 0.800" in page.text("summary")
    assert "preference accuracy 0.400 \u00b1 0.063 0.800 \u00b1 0.052 +0.400" in page.text("held-out")
    assert "lr 2e-05 6e-07" in page.text("configuration")
    assert "rows 5,000, kept 4,321, rejected/empty 679" in page.text("data")
    assert "0123abc with changes" in page.text("machine")
    assert "apex" not in page.text("machine")
    assert "torchrun -m megatron_rmipo.train --config" in page.text("next")
    assert f"--log-dir {logs}" in page.text("next")
    # Nothing decodes these ids.
    assert "Most certain after step 30 Pair 3 margin 1.03" in page.text("pairs")
    assert "[87][104][121][63]" in page.text("pairs")
    assert "The first 320 of 800 tokens." in page.text("pairs")
    # What links point at is there, once; nothing is fetched from anywhere.
    assert len(set(page.ids)) == len(page.ids)
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert {"#pairs", "#curve-gamma", "#curve-logps", "#curve-phases"} <= set(page.links)
    assert page.addresses == ["data:,"]


def test_texts_are_escaped_and_huge_ones_cut(tmp_path: Path) -> None:
    logs = write_page_run(tmp_path / MARKUP.replace("/", "_"), facts={"commit": MARKUP})
    text, answer = f"{MARKUP} {'why ' * 900}", f"{MARKUP}{'z' * 90_000}"
    sample = {"prompt": 0, "text": text, "answer": answer, "num_tokens": 9, "ended": False}
    write_lines(logs / "samples.jsonl", [{"step": step, **sample} for step in range(0, 90, 10)])
    table = EvaluationTable(MARKUP, ["set", MARKUP], [[MARKUP, 0.25]], MARKUP)
    write_evaluation(logs / "evaluation" / "a.json", Evaluation("side_by_side", MARKUP, "", [table]))
    page = page_of(logs)
    text = (logs / "report.html").read_text()
    assert "<script>alert" not in text
    assert page.text("evaluations").count(MARKUP) == 5  # title, caption, column, cell, note
    assert f"[... {len(answer) - 1500:,} characters ...]" in page.text("samples")
    assert "cut at its limit" in page.text("samples")
    # Of nine steps the first, the last and some between.
    assert re.findall(r"step (\d+)", page.text("samples")) == ["0", "20", "40", "60", "80"]
    assert "4 answers between these" in page.text("samples")
    assert len(text) < 200_000


def test_a_long_run_stays_a_small_page(tmp_path: Path) -> None:
    logs = write_page_run(tmp_path / "run", steps=6000)
    for number in range(16):
        write_page_tokens(logs, {"prompt": "p" * 3000, "chosen": "a" * 3000, "rejected": "b" * 3000}, number, "least certain")
    page_of(logs)
    assert (logs / "report.html").stat().st_size < 2_000_000


@pytest.mark.parametrize(
    ("flags", "metrics"),
    [
        (["--objective", "sft"], ("loss", "logps/chosen")),
        (["--objective", "dpo"], ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")),
        (["--objective", "kto"], ("loss", "logps/chosen")),
        (["--objective", "mine.losses:Own"], ("loss",)),
    ],
)
def test_runs_of_other_objectives_show_what_they_have(flags: list[str], metrics: tuple[str, ...], tmp_path: Path) -> None:
    def cut(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{name: pair[name] for name in metrics} for pair in pairs]

    named = flags[-1] if ":" in flags[-1] else ""
    logs = write_page_run(
        tmp_path / "run", flags=[] if named else flags, before=cut(pair_values(0.4)), after=cut(pair_values(0.8))
    )
    if named:
        config = logs / "config.yaml"
        config.write_text(config.read_text().replace("objective: rmipo", f"objective: {named}"))
    page = page_of(logs)
    assert "loss 0." in page.text("held-out")
    assert ("gamma" in page.text("held-out")) is False
    assert "curve-loss" in page.ids


def test_an_unfinished_run_and_one_without_anything_beside_its_records(tmp_path: Path) -> None:
    logs = write_page_run(tmp_path / "run", before=[], facts={"train_iters": 90})
    with (logs / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # killed here
    page = page_of(logs)
    assert "The run is not complete. It has come to step 30 of 90." in page.text("warnings")
    assert "No held-out pairs." in page.text("warnings")
    assert "None were evaluated." in page.text("held-out")
    assert f"--load {tmp_path / 'run'} --no-finetune" in page.text("next")
    (logs / "run.json").unlink()
    write_lines(logs / "metrics.jsonl", [train_record(1)])
    page = page_of(logs)
    assert "not recorded" in page.text("data")
    assert "curves" not in page.ids


def test_several_runs_begin_with_their_differences(tmp_path: Path) -> None:
    first = write_page_run(tmp_path / "first")
    second = write_page_run(tmp_path / "second", steps=20, flags=["--objective", "simpo", "--lr", "3e-6"], after=pair_values(0.6))
    page = page_of(first, second)
    assert next(iter(page.sections)) == "differences"
    rows = page.text("differences")
    assert rows.index("objective rmipo simpo") < rows.index(f"save {tmp_path / 'first'}")
    assert "lr 6e-07 3e-06" in rows
    assert "seed" not in rows
    assert "preference accuracy 0.800 \u00b1 0.052 0.600 \u00b1 0.063" in page.text("held-out")
    name = f"{tmp_path.name}/second"
    assert f"{name}: held out" in page.text("curves")
    assert name in page.text("summary")


def test_sets_by_name_kinds_and_the_best_checkpoint(tmp_path: Path) -> None:
    rows = tmp_path / "held_out.jsonl"
    write_lines(rows, [{"kind": "easy" if number < 48 else "hard"} for number in range(60)])
    held_out = {"pairs": 60, "sets": [{"prefix": "v", "num_pairs": 60, "sources": [{"name": str(rows)}]}]}
    logs = write_page_run(tmp_path / "run", facts={"data": {"held_out": held_out}})
    with (logs / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(eval_record(step, pair_values(0.5), "eval/other")) + "\n" for step in (0, 30))
    (logs / "best.json").write_text(
        json.dumps({"metric": "eval/loss", "step": 20, "value": 0.25, "checkpoint": "runs/a/iter_20"})
    )
    page = page_of(logs)
    assert f"60 pairs held out data set v made from {rows}" in page.text("data")
    # The first 24 pairs were right before, the first 48 after.
    assert "easy 48 0.500 \u00b1 0.072 1.000" in page.text("held-out")
    assert "hard 12 0.000 0.000" in page.text("held-out")
    assert "other step 0 step 30 change" in page.text("held-out")
    assert "Best by eval/loss: 0.25 at step 20, kept in runs/a/iter_20 ." in page.text("summary")


def test_a_run_with_sets_by_name_alone_that_stopped_early(tmp_path: Path) -> None:
    why = "early stop: loss was best at step 30 (0.5), and no better at 2 evaluations since"
    chat = {"pairs": 70, "evaluated": 60, "sets": [{"prefix": "c", "num_pairs": 70}]}
    logs = write_page_run(
        tmp_path / "run", before=[], facts={"train_iters": 90, "early_stop": why, "data": {"eval_data": {"chat": chat}}}
    )
    with (logs / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(eval_record(step, pair_values(0.5), "eval/chat")) + "\n" for step in (0, 30))
    write_lines(logs / "held_out_pairs.chat.jsonl", [{"step": 30, **pair} for pair in pair_values(0.5)])
    tokens = {"step": 30, "set": "chat", "pair": 3, "why": "most certain", "token_ids": [87]}
    lines = [{**tokens, "response": name, "logps": [-0.1], "alone": [None]} for name in ("chosen", "rejected")]
    write_lines(logs / "token_logps.jsonl", [{**tokens, "response": "prompt"}, *lines])
    page = page_of(logs)
    assert why in (logs / "report.html").read_text()
    assert "not complete" not in page.text("warnings")
    assert "--no-finetune" not in page.text("next")
    assert "held-out accuracy 0.500" in page.text("summary")
    assert "Pair 3 margin 1.03" in page.text("pairs")
    assert "70 pairs held out as chat, of which the first 60 are evaluated data set c" in page.text("data")


def test_the_tool_says_where_it_wrote_and_what_it_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = write_page_run(tmp_path / "run")
    assert main([str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {logs / 'report.html'}"
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"tables": [{"columns": ["a"], "rows": [[1, 2]]}]}')
    assert main([str(logs), "--evaluation", str(wrong), "--output", str(tmp_path / "x.html")]) == 1
    assert f"{wrong}: not an evaluation: it lacks one of kind, title, model, tables." in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()
    assert main([str(tmp_path)]) == 1
    assert f"{tmp_path}: no metrics.jsonl" in capsys.readouterr().err
    (logs / "metrics.jsonl").write_text('{"kind": "train"\n{}\n')
    assert main([str(logs)]) == 1
    assert "metrics.jsonl:1: not a JSON record" in capsys.readouterr().err
