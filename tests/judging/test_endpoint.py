"""An endpoint is asked again where that may help, and otherwise refused; the key goes nowhere else."""

from __future__ import annotations

import pytest

from megatron_rmipo.errors import ConfigError, JudgeError
from megatron_rmipo.judging.endpoint import Endpoint, Reply
from tests.judging.servers import Fault, Judge, running


def endpoint(judge: Judge, waits: list[float], num_retries: int = 3) -> Endpoint:
    how = {"timeout_seconds": 0.5, "num_retries": num_retries, "sleep": waits.append}
    return Endpoint(judge.url, "j", key="secret-key", fields={"max_tokens": 5}, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("fault", [429, 500, 503, "nonsense", "silence"])
def test_a_fault_that_passes_is_asked_again_later(fault: Fault) -> None:
    waits: list[float] = []
    with running(lambda _: "[[A]]", [fault, fault]) as judge:
        assert endpoint(judge, waits).ask("x") == Reply("[[A]]", 10, 2)
    assert len(judge.bodies) == 3
    assert judge.bodies[0] == {"model": "j", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
    assert judge.headers[0]["Authorization"] == "Bearer secret-key"
    if fault == 429:
        # As long as it says, and longer where ours is.
        assert waits == [7.0, 7.0]
    else:
        assert 1 <= waits[0] <= 1.5
        assert 2 <= waits[1] <= 3


@pytest.mark.parametrize("fault", [429, "nonsense", "silence"])
def test_one_that_stays_is_told(fault: Fault) -> None:
    with running(faults=[fault] * 2) as judge, pytest.raises(JudgeError, match="2 times in a row") as error:
        endpoint(judge, [], num_retries=1).ask("x")
    assert "secret-key" not in str(error.value)


@pytest.mark.parametrize("status", [400, 401, 404, 302])
def test_a_refusal_is_told_at_once_without_the_key(status: int) -> None:
    with running(faults=[status]) as judge, pytest.raises(ConfigError, match=f"status {status}") as error:
        endpoint(judge, []).ask("x")
    assert len(judge.bodies) == 1
    assert "secret-key" not in str(error.value)
    assert "is not to be told" in str(error.value)


def test_nobody_there_and_no_address() -> None:
    with running() as judge:
        pass
    with pytest.raises(JudgeError, match="efused"):
        endpoint(judge, []).ask("x")
    with pytest.raises(ConfigError, match="an address such as"):
        Endpoint("localhost:8000", "j", key=None, fields={}, timeout_seconds=1, num_retries=0)
