"""Whether ranks on this machine meet and compute together: gloo, and NCCL where there are GPUs."""

from __future__ import annotations

import datetime
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_rmipo.command import DONE, FAULT_OF_OURS
from megatron_rmipo.doctor.findings import Finding
from megatron_rmipo.torchrun import read_launch

_TIMEOUT_SECONDS = 60
_NUM_VALUES = 2**20
_REMEDIES = {
    "gloo": "Ranks meet over the host's network: look at its name in /etc/hosts, a firewall, GLOO_SOCKET_IFNAME",
    "nccl": "NCCL_DEBUG=INFO says more; look at /dev/shm, at IOMMU and ACS of virtual machines, and try NCCL_P2P_DISABLE=1",
}


def look_at_ranks() -> Iterator[Finding]:
    """A finding for each backend."""
    yield _try_backend("gloo", 2)
    if torch.cuda.is_available():
        yield _try_backend("nccl", min(2, torch.cuda.device_count()))


def _try_backend(backend: str, world_size: int) -> Finding:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC_", "GROUP_"))}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_rmipo.doctor.ranks", backend]
    ranks = [
        subprocess.Popen(
            command,
            env={**clean, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    try:
        results = [rank.communicate(timeout=max(0.1, deadline - time.monotonic())) for rank in ranks]
    except subprocess.TimeoutExpired:
        return Finding(backend, "FAIL", f"{world_size} ranks did not finish within {_TIMEOUT_SECONDS} s", _REMEDIES[backend])
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for rank, (_, error) in zip(ranks, results, strict=True):
        if rank.returncode:
            last = (error.strip().splitlines() or [f"exit code {rank.returncode}"])[-1]
            return Finding(backend, "FAIL", last, _REMEDIES[backend])
    return Finding(backend, "OK", results[0][0].strip())


def main() -> int:
    """One rank: a few collectives, their results compared with what they must be."""
    backend = sys.argv[1]
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=_TIMEOUT_SECONDS))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", read_launch().local_rank) if backend == "nccl" else torch.device("cpu")
    own = torch.full((_NUM_VALUES,), float(rank + 1), device=device)
    total = own.clone()
    dist.all_reduce(total)
    gathered = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(gathered, own)
    share = torch.empty(_NUM_VALUES // world_size, device=device)
    dist.reduce_scatter_tensor(share, own)
    first = own.clone()
    dist.broadcast(first, 0)
    expected = world_size * (world_size + 1) / 2
    right = bool((total == expected).all() and (share == expected).all() and (first == 1).all())
    right = right and all(bool((one == number + 1).all()) for number, one in enumerate(gathered))
    started = time.perf_counter()
    for _ in range(3):
        dist.all_reduce(total)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / 3
    dist.destroy_process_group()
    if not right:
        print("collectives gave other values than they must", file=sys.stderr)
        return FAULT_OF_OURS
    print(f"{world_size} ranks: sums, gathers, broadcasts right; 4 MiB summed in {1e3 * seconds:.1f} ms")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
