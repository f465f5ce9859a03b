#!/usr/bin/env python3
"""Put the evaluations of a model beside those of the model it was made from.

python tools/compare_evaluations.py --model work/evaluation/model --base work/evaluation/base --output work/both
"""

import sys

from megatron_rmipo.entry import compare_evaluations

if __name__ == "__main__":
    sys.exit(compare_evaluations())
