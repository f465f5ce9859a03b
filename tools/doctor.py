#!/usr/bin/env python3
"""Say whether this machine is fit to train, by versions, GPUs, kernels against their references, and ranks.

python tools/doctor.py
"""

import sys

from megatron_rmipo.entry import doctor

if __name__ == "__main__":
    sys.exit(doctor())
