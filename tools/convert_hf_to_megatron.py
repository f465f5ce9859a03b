#!/usr/bin/env python3
"""Convert a Hugging Face model to a Megatron checkpoint.

python tools/convert_hf_to_megatron.py --hf-model DIR --save DIR
"""

import sys

from megatron_rmipo.checkpoint.hf_to_megatron_cli import main

if __name__ == "__main__":
    sys.exit(main())
