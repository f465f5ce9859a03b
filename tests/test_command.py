from __future__ import annotations

import argparse
import time
from typing import NoReturn

import pytest

from megatron_rmipo import command
from megatron_rmipo.command import number, progress_bar, run_command, whole_number
from megatron_rmipo.errors import DataError


def fail(error: BaseException) -> NoReturn:
    raise error


def test_a_fault_of_the_user_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: fail(DataError("rows.jsonl: no such file."))) == 1
    assert capsys.readouterr().err == "error: rows.jsonl: no such file.\n"
    with pytest.raises(DataError):
        run_command(lambda: fail(DataError("x")), debug=True)


def test_an_interrupt_is_said_and_other_faults_are_not_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: None) == 0
    assert run_command(lambda: fail(KeyboardInterrupt()), interrupted="nothing was written") == 130
    assert capsys.readouterr().err == "nothing was written\n"
    for fault in (BrokenPipeError(), ValueError()):
        with pytest.raises(type(fault)):
            run_command(lambda fault=fault: fail(fault))  # type: ignore[misc]


def test_a_log_file_gets_a_line_now_and_then_and_none_of_what_is_soon_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*, seconds: float, shown: bool = True) -> str:
        monkeypatch.setattr(command, "_SECONDS_BETWEEN_LINES", seconds)
        with progress_bar("evaluation", 7, "pair", shown=shown) as bar:
            for _ in range(7):
                time.sleep(0.01)
                bar.update(1)
        return capsys.readouterr().err

    assert run(seconds=30.0) == ""
    assert run(seconds=0.0, shown=False) == ""
    told = run(seconds=0.005)
    assert "evaluation: 100%" in told
    assert "pair/s" in told
    assert "<" in told, "no time left"


def test_numbers_of_flags_are_read_or_refused_with_their_bounds() -> None:
    assert (whole_number(1)("3"), number()("0"), number(1.0, with_zero=False)("1")) == (3, 0.0, 1.0)
    for read, text, said in (
        (whole_number(1), "0", "0 is below 1"),
        (whole_number(0), "1.5", "1.5 is no whole number"),
        (number(), "inf", "inf is not 0 or above, finite"),
        (number(), "nan", "nan is not 0 or above, finite"),
        (number(), "x", "x is no number"),
        (number(1.0, with_zero=False), "0", "0 is not above 0, finite, at most 1"),
        (number(1.0, with_zero=False), "1.5", "at most 1"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=said):
            read(text)
