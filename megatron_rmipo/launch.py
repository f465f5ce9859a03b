"""``python -m megatron_rmipo.launch``: torchrun with the same flags, whose exit code says how the ranks of this node ended."""

import sys

from megatron_rmipo.entry import launch

if __name__ == "__main__":
    sys.exit(launch())
