#!/usr/bin/env python3
"""Turn preference data into Megatron's indexed format.

python tools/preprocess_preferences.py --input pairs.jsonl --tokenizer-model DIR --output-prefix data/pairs --workers 8
"""

import sys

from megatron_rmipo.entry import preprocess_preferences

if __name__ == "__main__":
    sys.exit(preprocess_preferences())
