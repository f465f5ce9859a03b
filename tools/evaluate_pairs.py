#!/usr/bin/env python3
"""How often a checkpoint's log-probs prefer the better of two answers, on preference sets in the form their files have; no judge.

python tools/evaluate_pairs.py --load-hf MODEL_DIR --data rewardbench=allenai/reward-bench#filtered --bf16 --output results.json
"""

import sys

from megatron_rmipo.entry import evaluate_pairs

if __name__ == "__main__":
    sys.exit(evaluate_pairs())
