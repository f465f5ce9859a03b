#!/usr/bin/env python3
"""Show several runs side by side, as tables and as a picture.

python tools/compare_runs.py --runs work/embedded/comparison --picture comparison.png
"""

import sys

from megatron_rmipo.entry import compare_runs

if __name__ == "__main__":
    sys.exit(compare_runs())
