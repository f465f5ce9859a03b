from __future__ import annotations

import time
from typing import NoReturn

import pytest

from megatron_rmipo import command
from megatron_rmipo.command import progress_bar, run_command
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
