#!/usr/bin/env python3
"""Send an exported model to the Hugging Face Hub; without --yes only say what would be sent.

python tools/push_to_hub.py DIR OWNER/NAME --yes
"""

import sys

from megatron_rmipo.entry import push_to_hub

if __name__ == "__main__":
    sys.exit(push_to_hub())
