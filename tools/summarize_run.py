#!/usr/bin/env python3
"""Show what a run did to its held-out pairs.

python tools/summarize_run.py --log-dir work/llama3-8b/rmipo/logs --picture margins.png
"""

import sys

from megatron_rmipo.entry import summarize_run

if __name__ == "__main__":
    sys.exit(summarize_run())
