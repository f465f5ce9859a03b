#!/usr/bin/env python3
"""Convert a Hugging Face model to a Megatron checkpoint.

python tools/convert_hf_to_megatron.py --hf-model DIR --save DIR
"""

import sys

from megatron_rmipo.entry import convert_hf_to_megatron

if __name__ == "__main__":
    sys.exit(convert_hf_to_megatron())
