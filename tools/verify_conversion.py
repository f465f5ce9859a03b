#!/usr/bin/env python3
"""Compare a Megatron model's logits with those of transformers.

python tools/verify_conversion.py --hf-model DIR --load DIR --tensor-model-parallel-size 2
"""

import sys

from megatron_rmipo.entry import verify_conversion

if __name__ == "__main__":
    sys.exit(verify_conversion())
