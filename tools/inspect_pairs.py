#!/usr/bin/env python3
"""Show preprocessed pairs as text with the boundary marked, and histograms of their lengths.

python tools/inspect_pairs.py data/pairs 3
"""

import sys

from megatron_rmipo.entry import inspect_pairs

if __name__ == "__main__":
    sys.exit(inspect_pairs())
