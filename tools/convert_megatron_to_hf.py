#!/usr/bin/env python3
"""Convert a Megatron checkpoint to a Hugging Face model.

python tools/convert_megatron_to_hf.py --load DIR --save-hf DIR
"""

import sys

from megatron_rmipo.checkpoint.megatron_to_hf_cli import main

if __name__ == "__main__":
    sys.exit(main())
