"""What the launcher makes of how its ranks ended, and what it does at a signal before there are any."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from megatron_rmipo.runtime.launcher import how_it_ended

NOW = 1_000_000.5


def failed(exit_code: int, when: float = NOW) -> ProcessFailure:
    failure = ProcessFailure(0, 123, exit_code, "no such file")
    failure.timestamp = int(when)
    return failure


KILLED, ENDED = -signal.SIGKILL, -signal.SIGTERM


@pytest.mark.parametrize(
    ("told", "failures", "signalled", "code", "said"),
    [
        ([(NOW, 0), (NOW, 0)], {}, False, 0, ""),
        ([(NOW, 75), (NOW, 75)], {}, True, 75, ""),
        # torchrun ends the others after the first.
        ([(NOW, 1)], {2: failed(1), 0: failed(ENDED)}, False, 1, ""),
        ([(NOW, 70), (NOW + 1, 1)], {2: failed(70), 0: failed(1)}, False, 70, ""),
        # The others lost the one that was killed, and said so before torchrun saw it.
        ([(NOW, 70)], {1: failed(KILLED, NOW + 0.7), 0: failed(70)}, False, 70, "rank 1 (process 123) was ended by SIGKILL"),
        # torchrun killed one that did not end.
        ([(NOW, 1)], {0: failed(1), 1: failed(KILLED, NOW + 30)}, False, 1, ""),
        ([], {0: failed(ENDED), 1: failed(ENDED)}, True, 130, "ended by a signal before"),
        ([(NOW, 70)], {1: failed(70), 0: failed(ENDED)}, True, 130, "ended by a signal before"),
        ([(NOW, 1)], {1: failed(1), 0: failed(ENDED)}, True, 1, ""),
        ([], {3: failed(9)}, False, 70, "rank 3 ended with exit code 9"),
    ],
)
def test_one_code_stands_for_all_ranks(
    told: list[tuple[float, int]], failures: dict[int, ProcessFailure], signalled: bool, code: int, said: str
) -> None:
    found, message = how_it_ended(told, failures, signalled=signalled)
    assert (found, message.startswith(said), bool(message)) == (code, True, bool(said))


def test_a_signal_ends_a_wait_for_other_nodes() -> None:
    # The first node, which hears of this one and never answers.
    with socket.create_server(("127.0.0.1", 0)) as first_node:
        first_node.settimeout(120)
        where = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1", "--master-port"]
        where.append(str(first_node.getsockname()[1]))
        command = [sys.executable, "-m", "megatron_rmipo.launch", *where, "-m", "json.tool"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        connection, _ = first_node.accept()
        with connection:
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "ended by a signal before a rank was started\n")


def test_a_rank_that_is_started_anew_after_a_signal_hears_of_it(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import sys, time\nopen(sys.argv[1], 'a').write('up\\n')\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "megatron_rmipo.launch", "--max-restarts", "2", str(program), str(tmp_path / "starts")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "starts").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=40)
    assert process.returncode == 130, said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nproc-per-node", "two", "-m", "json.tool"], ["the ranks cannot be started", "--nproc-per-node"]),
        (["--nproc-per-node", "1", "nowhere.py"], ["nowhere.py is no file"]),
    ],
)
def test_what_cannot_be_started_is_said(arguments: list[str], words: list[str]) -> None:
    command = [sys.executable, "-m", "megatron_rmipo.launch", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert all(word in done.stderr for word in words)
