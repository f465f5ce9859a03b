#!/usr/bin/env python3
"""Show preprocessed pairs as text with the boundary marked, and histograms of their lengths.

python tools/inspect_pairs.py data/pairs 3
"""

import sys

from megatron_rmipo.data.preparing.inspect_cli import main

if __name__ == "__main__":
    sys.exit(main())
