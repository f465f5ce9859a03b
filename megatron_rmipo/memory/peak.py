"""The most memory a rank has used."""

from __future__ import annotations

import resource
import sys

import torch


def forget_peak_memory() -> None:
    """Begin to look for the peak anew, where the device's allocator keeps it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes() -> int:
    """Most memory in use so far: of the device's allocator with CUDA, else of the process (resident set)."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
