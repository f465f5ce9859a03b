#!/usr/bin/env python3
"""Compute log-probs of prepared data under a checkpoint, once, for objectives that compare with a reference.

torchrun --nproc-per-node 8 tools/score_pairs.py --load-hf MODEL_DIR --pairs data/pairs --tensor-model-parallel-size 8 --bf16
"""

import sys

from megatron_rmipo.entry import score_pairs

if __name__ == "__main__":
    sys.exit(score_pairs())
