from __future__ import annotations

from typing import NoReturn

import pytest

from megatron_rmipo.command import run_command
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
