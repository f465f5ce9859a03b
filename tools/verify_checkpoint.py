#!/usr/bin/env python3
"""Say whether checkpoints are complete, readable, and what was written.

python tools/verify_checkpoint.py DIR
"""

import sys

from megatron_rmipo.entry import verify_checkpoint

if __name__ == "__main__":
    sys.exit(verify_checkpoint())
