#!/usr/bin/env python3
"""Merge a PEFT adapter into the model that it belongs to.

python tools/merge_adapter.py --load-adapter DIR --save-hf DIR
"""

import sys

from megatron_rmipo.entry import merge_adapter

if __name__ == "__main__":
    sys.exit(merge_adapter())
