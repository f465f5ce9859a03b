#!/usr/bin/env python3
"""Write the report of a run, or of several side by side.

python tools/report.py work/llama3-8b/rmipo --output work/llama3-8b/report.html
"""

import sys

from megatron_rmipo.entry import report

if __name__ == "__main__":
    sys.exit(report())
