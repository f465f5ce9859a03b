"""The progress line on a terminal and elsewhere."""

from __future__ import annotations

from io import StringIO

import pytest

from megatron_rmipo.reports.progress_line import ProgressLine

RECORD = {
    "step": 7,
    "loss": 0.69314,
    "rewards/accuracies": 0.5,
    "gamma": 1.6,
    "lr": 6e-7,
    "step_seconds": 40.0,
    "mfu": 0.456,
    "unknown": 3.0,
}


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_a_plain_line_per_record_without_a_terminal() -> None:
    stream = StringIO()
    progress = ProgressLine(stream, 120)
    progress.show("train", RECORD)
    progress.show(
        "eval", {"step": 7, "num_pairs": 9, "loss": 0.5, "loss/se": 0.01, "rewards/margins": 2.5, "rewards/margins/n": 4}
    )
    progress.say("warning: something")
    progress.close()
    assert stream.getvalue().splitlines() == [
        "step   7/120 eta 1:15:20 | loss 0.6931 | acc 0.500 | gamma 1.600 | lr 6.00e-07 | MFU 45.6%",
        "eval at step   7/120 | n 9 | loss 0.5000 +- 0.0100 | margin 2.500 (n 4)",
        "warning: something",
    ]


def test_one_redrawn_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    stream = Terminal()
    progress = ProgressLine(stream, 120)
    progress.show("train", RECORD)
    progress.say("kept")
    progress.show("train", {**RECORD, "step": 8})
    progress.close()
    screen = screen_of(stream.getvalue())
    assert screen == ["kept", "step   8/120 eta 1:14:40 | lo", ""]


def screen_of(written: str) -> list[str]:
    """What a terminal shows: carriage return with erase starts the current line afresh."""
    return [line.split("\r\x1b[K")[-1] for line in written.split("\n")]


def test_messages_before_the_first_record() -> None:
    stream = Terminal()
    progress = ProgressLine(stream, 5)
    progress.say("hello")
    progress.close()
    assert stream.getvalue() == "hello\n"
