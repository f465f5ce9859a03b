#!/usr/bin/env python3
"""Draw the figures of the RMiPO paper from runs.

python tools/plot_runs.py training --runs rmipo=runs/a simpo=runs/b --output training.png
"""

import sys

from megatron_rmipo.entry import plot_runs

if __name__ == "__main__":
    sys.exit(plot_runs())
