#!/usr/bin/env python3
"""Convert a Megatron checkpoint to a Hugging Face model.

python tools/convert_megatron_to_hf.py --load DIR --save-hf DIR
"""

import sys

from megatron_rmipo.entry import convert_megatron_to_hf

if __name__ == "__main__":
    sys.exit(convert_megatron_to_hf())
