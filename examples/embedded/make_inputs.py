"""Make the inputs of the embedded default: ``python examples/embedded/make_inputs.py --output DIR --seed 1``."""

import sys

from megatron_rmipo.entry import make_inputs

if __name__ == "__main__":
    sys.exit(make_inputs())
