"""torchrun with the same flags, whose exit code says how the ranks of this node ended.

torchrun answers every end but success with 1 and a traceback of its own. A signal to this goes on to the ranks, and it ends when
they have.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch.distributed as dist
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError

from megatron_rmipo.command import DONE, FAULT_OF_OURS, FAULT_OF_USER, INTERRUPTED, STOPPED
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.torchrun import ENDS_VARIABLE

# Between two looks for ranks that were started anew after a signal.
_LOOK_SECONDS = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Start ranks and wait for them; returns the exit code, see docs/training.md."""
    arguments = torchrun.parse_args(argv)  # type: ignore[no-untyped-call]
    if not (arguments.module or arguments.no_python or Path(arguments.training_script).is_file()):
        raise ConfigError(f"{arguments.training_script} is no file. Name the program to start, or -m and a module.")
    # Of the others it would end ranks after a timeout, and itself with a traceback.
    arguments.signals_to_handle = "SIGQUIT"
    if "--debug" not in arguments.training_script_args:
        for name in ("torch.distributed.elastic", "torch.distributed.run"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    failures: Mapping[int, ProcessFailure] = {}
    with tempfile.TemporaryDirectory(prefix="megatron_rmipo_") as ends:
        os.environ[ENDS_VARIABLE] = ends
        relay = SignalRelay()
        try:
            torchrun.run(arguments)  # type: ignore[no-untyped-call]
        except ChildFailedError as error:
            failures = error.failures
        except ValueError as error:
            raise ConfigError(
                f"the ranks cannot be started: {error}. Look at --nproc-per-node, --nnodes and --node-rank (whole numbers)."
            ) from error
        except (dist.DistError, RendezvousError) as error:
            where = f"--master-addr {arguments.master_addr} --master-port {arguments.master_port}"
            raise ConfigError(
                f"the nodes did not meet at {where}: {str(error).splitlines()[0]}. It must be an address of node 0 that this one "
                "reaches, and the port free there."
            ) from error
        told = [(float(when), int(code)) for when, code in (path.read_text().split() for path in Path(ends).iterdir())]
    code, message = how_it_ended(told, failures, signalled=relay.signalled)
    if message:
        print(message, file=sys.stderr)
    return code


def how_it_ended(
    told: Sequence[tuple[float, int]], failures: Mapping[int, ProcessFailure], *, signalled: bool
) -> tuple[int, str]:
    """The exit code that stands for all ranks of this node: that of the first to fail; and what the ranks have not said.

    Args:
        told: (seconds since 1970, exit code) of each rank that came to its end.
        failures: rank -> what torchrun knows of one that ended with another code than 0, in the order in which it saw them.
        signalled: whether a signal was handed on to them.
    """
    faults = sorted((when, code) for when, code in told if code not in (DONE, STOPPED))
    codes = [code for _, code in faults]
    by_signal = [failure for failure in failures.values() if failure.exitcode in (-signal.SIGTERM, -signal.SIGINT)]
    # A rank that a signal ended before it listened for one; the others lost it. torchrun, too, ends ranks so, but after a fault.
    if by_signal and FAULT_OF_USER not in codes and (signalled or next(iter(failures.values())) is by_signal[0]):
        return INTERRUPTED, "ended by a signal before there was anything new to save; start again to go on"
    killed = [(rank, failure) for rank, failure in failures.items() if failure.exitcode < 0 and failure not in by_signal]
    # torchrun sees it up to a tenth of a second later, and notes whole seconds; ranks that it kills itself come much later.
    if killed and (not faults or killed[0][1].timestamp - 1 <= faults[0][0]):
        rank, failure = killed[0]
        name = signal.Signals(-failure.exitcode).name
        cause = "; if nobody sent it, the host was out of memory, which dmesg tells" if name == "SIGKILL" else ""
        return FAULT_OF_OURS, f"rank {rank} (process {failure.pid}) was ended by {name}{cause}"
    if faults:
        return codes[0], ""
    if failures:
        return FAULT_OF_OURS, ", ".join(f"rank {rank} ended with exit code {one.exitcode}" for rank, one in failures.items())
    return (STOPPED if any(code == STOPPED for _, code in told) else DONE), ""


class SignalRelay:
    """Hands SIGTERM, SIGINT and SIGHUP on to the ranks, as SIGTERM; before there are any it ends this process.

    Attributes:
        signalled: whether it has done so.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self.signalled = False
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in self.SIGNALS:
            signal.signal(number, lambda *_: None)
        # A thread reads them: the main one may wait for other nodes in a call that runs no Python handler.
        signal.set_wakeup_fd(writer)
        threading.Thread(target=self._hand_on, daemon=True).start()

    def _hand_on(self) -> None:
        reached: set[int] = set()
        while True:
            # Ranks that torchrun starts anew after a signal (--max-restarts) are to hear of it as well.
            if select.select([self._reader], [], [], _LOOK_SECONDS if self.signalled else None)[0]:
                if os.read(self._reader, 1)[0] not in self.SIGNALS:
                    continue
                reached.clear()
            ranks = psutil.Process().children()
            if not ranks and not self.signalled:
                print("ended by a signal before a rank was started", file=sys.stderr, flush=True)
                os._exit(INTERRUPTED)
            self.signalled = True
            for rank in ranks:
                if rank.pid not in reached:
                    reached.add(rank.pid)
                    with contextlib.suppress(psutil.NoSuchProcess):
                        rank.send_signal(signal.SIGTERM)
