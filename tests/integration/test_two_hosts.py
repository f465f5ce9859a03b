"""Two hosts, as network namespaces joined by a virtual link: each starts its own torchrun; one is cut off and dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.data import write_pairs
from tests.integration.test_training import flags, losses

STEPS = 12
PREFIX = "10.231.77."


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Host:
    """A network namespace with one end of the link.

    Args:
        number: 1 or 2.
    """

    def __init__(self, number: int) -> None:
        self.number, self.space = number, f"rmipo-{os.getpid()}-{number}"
        # Names of interfaces hold 15 characters.
        self.interface, self.address = f"rm{os.getpid() % 10**7}e{number}", f"{PREFIX}{number}"

    def command(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.space, *words]

    def start(self, arguments: list[str], port: int, output: Path) -> subprocess.Popen[bytes]:
        """Its torchrun, with one rank."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(self.number - 1)]
        address = ["--nproc-per-node", "1", "--master-addr", f"{PREFIX}1", "--master-port", str(port)]
        return self.run([*torchrun, *address, "-m", "megatron_rmipo.train", *arguments], output)

    def run(self, words: list[str], output: Path, **variables: str) -> subprocess.Popen[bytes]:
        """A command here, with these variables."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.interface, **variables}
        command = self.command(*words)
        with output.open("ab") as stream:
            return subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, start_new_session=True)


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two hosts with a link between them; skips where namespaces are not allowed."""
    both = [Host(1), Host(2)]
    made: list[Host] = []
    try:
        try:
            for host in both:
                _ip("netns", "add", host.space)
                made.append(host)
            _ip("link", "add", both[0].interface, "type", "veth", "peer", "name", both[1].interface)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', '') or error}")
        for host in both:
            _ip("link", "set", host.interface, "netns", host.space)
            for words in (
                ["addr", "add", f"{host.address}/24", "dev", host.interface],
                ["link", "set", host.interface, "up"],
                ["link", "set", "lo", "up"],
            ):
                _ip("-n", host.space, *words)
        yield both
    finally:
        for host in made:
            _ip("netns", "del", host.space)


def _wait_for_step(save: Path, step: int, processes: list[subprocess.Popen[bytes]], outputs: list[Path]) -> None:
    deadline, metrics = time.monotonic() + 240, save / "logs" / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        told = "\n".join(path.read_text() for path in outputs)
        assert all(process.poll() is None for process in processes), told
        assert time.monotonic() < deadline, told
        time.sleep(0.1)


def _rank_of(process: subprocess.Popen[bytes]) -> psutil.Process:
    """The one rank below a launcher."""
    found = [one for one in psutil.Process(process.pid).children(recursive=True) if "RANK" in one.environ()]
    ranks = [one for one in found if one.parent() not in found]
    assert len(ranks) == 1
    return ranks[0]


def _kill(process: subprocess.Popen[bytes]) -> None:
    """As a host that loses its power: every process of it at once."""
    everything = [process, *psutil.Process(process.pid).children(recursive=True)]
    for one in everything:
        one.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.dist
@pytest.mark.slow
def test_a_host_that_is_cut_off_and_dies_costs_no_more_than_the_steps_since_the_last_checkpoint(
    hosts: list[Host], tmp_path: Path
) -> None:
    prefix = write_pairs(tmp_path / "data" / "pairs")
    common: dict[str, Any] = {"train_iters": STEPS, "save_interval": 2, "split": None, "distributed_timeout_minutes": 0.25}

    def begin(save: Path, port: int, **changes: Any) -> tuple[list[subprocess.Popen[bytes]], list[Path]]:
        arguments = flags(prefix, save, **common, **changes)
        outputs = [tmp_path / f"{save.name}-{host.number}.txt" for host in hosts]
        return [host.start(arguments, port, output) for host, output in zip(hosts, outputs, strict=True)], outputs

    def finish(processes: list[subprocess.Popen[bytes]], outputs: list[Path]) -> None:
        codes = [process.wait(timeout=240) for process in processes]
        assert codes == [0, 0], "\n".join(path.read_text() for path in outputs)

    finish(*begin(tmp_path / "whole", 29511))
    save = tmp_path / "parts"
    processes, outputs = begin(save, 29512, load=save)
    _wait_for_step(save, 3, processes, outputs)
    _ip("-n", hosts[1].space, "link", "set", hosts[1].interface, "down")
    cut_at = time.monotonic()
    first = processes[0].wait(timeout=120)
    assert first != 0
    assert time.monotonic() - cut_at < 90, "the host that is left must not wait for ever"
    _kill(processes[1])
    _ip("-n", hosts[1].space, "link", "set", hosts[1].interface, "up")
    before = (save / "latest_checkpointed_iteration.txt").read_text().strip()
    assert int(before) < STEPS, "the cut came too late to cost anything"
    finish(*begin(save, 29513, load=save))
    assert f"step {before} of {save}" in outputs[0].read_text()
    assert losses(save) == losses(tmp_path / "whole")


@pytest.mark.dist
@pytest.mark.slow
def test_a_rank_that_is_killed_is_started_anew_on_both_hosts_and_the_run_goes_on(hosts: list[Host], tmp_path: Path) -> None:
    """By the launcher of plain torchrun, from the model and the rows on."""
    root, work = Path(__file__).parents[2], tmp_path / "work"
    shared = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **{"NUM_NODES": "2", "GPUS_PER_NODE": "1", "MASTER_ADDR": f"{PREFIX}1", "MASTER_PORT": "29514", "WORK_DIR": str(work)},
        **{"STEPS": str(STEPS), "SAVE_INTERVAL": "2", "GLOBAL_BATCH_SIZE": "6", "LOG_INTERVAL": "1", "EVAL_INTERVAL": "0"},
        **{"SFT_DATA": "", "MAX_RESTARTS": "1", "EMBEDDED_FLAGS": "--sft-rows 100 --train-pairs 100 --heldout-pairs 8"},
    }
    command = ["bash", str(root / "examples/launchers/torchrun.sh"), "--distributed-timeout-minutes", "1"]
    outputs = [tmp_path / f"{host.number}.txt" for host in hosts]
    processes = [
        host.run(command, output, NODE_RANK=str(host.number - 1), **shared) for host, output in zip(hosts, outputs, strict=True)
    ]
    try:
        _wait_for_step(work / "rmipo", 3, processes, outputs)
        _rank_of(processes[1]).kill()
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                _kill(process)
    told = "\n".join(path.read_text() for path in outputs)
    assert codes == [0, 0], told
    # The first launcher has started it without --load of its own directory.
    assert re.search(rf"from step \d+ of {work / 'rmipo'}", told), told
    assert list(losses(work / "rmipo")) == list(range(1, STEPS + 1))
    assert (work / "hf" / "config.json").is_file()
