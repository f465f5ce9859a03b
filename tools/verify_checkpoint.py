#!/usr/bin/env python3
"""Say whether checkpoints are complete, readable, and what was written.

python tools/verify_checkpoint.py DIR
"""

import sys

from megatron_rmipo.checkpoint.verify_checkpoint_cli import main

if __name__ == "__main__":
    sys.exit(main())
