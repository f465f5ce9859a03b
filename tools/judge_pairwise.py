#!/usr/bin/env python3
"""Have a judge, any OpenAI-compatible endpoint, compare the answers of two models.

python tools/judge_pairwise.py --answers work/answers/a.jsonl --baseline work/answers/b.jsonl \
    --base-url http://localhost:8000/v1 --judge-model my-judge --output work/answers/a.judged.json
"""

import sys

from megatron_rmipo.entry import judge_pairwise

if __name__ == "__main__":
    sys.exit(judge_pairwise())
