#!/usr/bin/env python3
"""Answer the questions of a benchmark with a model, in the form that the benchmark's judge reads.

python tools/generate_answers.py --model runs/a-hf --benchmark mt_bench --prompts question.jsonl --output work/answers
"""

import sys

from megatron_rmipo.entry import generate_answers

if __name__ == "__main__":
    sys.exit(generate_answers())
