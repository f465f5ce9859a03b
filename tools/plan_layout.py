#!/usr/bin/env python3
"""Find the layout with which a model trains fastest on some machines, by estimate; none of them is needed.

python tools/plan_layout.py --hf-model llama3-70b --lengths 200,300,300 --gpus 32
"""

import sys

from megatron_rmipo.entry import plan_layout

if __name__ == "__main__":
    sys.exit(plan_layout())
