"""``python -m megatron_rmipo NAME ...``: as ``megatron-rmipo NAME ...``, where nothing is installed."""

import sys

from megatron_rmipo.entry import subcommand

if __name__ == "__main__":
    sys.exit(subcommand())
