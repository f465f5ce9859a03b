"""What the machine has: processors, GPUs, memory, disk, and what the system allows a process."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

from megatron_rmipo.doctor.findings import Finding, Status

_GIB = 2**30
# Loaders hand batches over in shared memory, and NCCL keeps buffers there: containers begin with 64 MiB.
_LEAST_SHARED_GIB = 1.0
_LEAST_DISK_GIB = 20.0
# Each rank holds connections to others, files of weights, and pipes of its workers.
_LEAST_FILES = 4096


def look_at_machine(directory: Path) -> Iterator[Finding]:
    """A finding for each.

    Args:
        directory: where a run would write.
    """
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("host", "OK", f"{cores} cores, {memory.total / _GIB:.0f} GiB memory, {memory.available / _GIB:.0f} GiB free")
    yield from _gpus()
    yield _space("disk", directory, _LEAST_DISK_GIB, "WARN", "A checkpoint takes up to ten times the weights: --save elsewhere")
    shared = Path("/dev/shm")
    if shared.is_dir():
        yield _space("/dev/shm", shared, _LEAST_SHARED_GIB, "WARN", "In a container: docker run --shm-size 16g")
    yield _files()


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding("GPUs", "WARN", "none that torch can use; runs go over the CPU", _why_none())
        return
    driver = _driver()
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        text = f"{properties.name}, {total / _GIB:.0f} GiB, {free / _GIB:.0f} GiB free, compute capability {properties.major}."
        used = free < 0.9 * total
        remedy = "Another process holds the rest: nvidia-smi names it" if used else ""
        yield Finding(f"GPU {number}", "WARN" if used else "OK", f"{text}{properties.minor}{driver}", remedy)


def _driver() -> str:
    found = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return f", driver {found.splitlines()[0].strip()}" if found else ""


def _why_none() -> str:
    if _output_of("nvidia-smi", "-L"):
        return "nvidia-smi sees some: install a torch that is built with CUDA, and look at CUDA_VISIBLE_DEVICES"
    return "That is as it must be without an NVIDIA GPU and its driver"


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _space(name: str, place: Path, least: float, otherwise: Status, remedy: str) -> Finding:
    free = shutil.disk_usage(place).free / _GIB
    enough = free >= least
    return Finding(name, "OK" if enough else otherwise, f"{free:.1f} GiB free in {place}", "" if enough else remedy)


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _LEAST_FILES:
        return Finding("open files", "OK", "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft:,}")
    allowed = "unlimited" if hard == resource.RLIM_INFINITY else str(max(soft, min(hard, 65536)))
    return Finding("open files", "WARN", f"at most {soft:,}, few for many ranks", f"ulimit -n {allowed}")
