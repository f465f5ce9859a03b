#!/usr/bin/env bash
# RMiPO on several nodes without a scheduler: the same on every node, with its number. WORK_DIR, HF_MODEL and DATA must lie on a file
# system that all nodes see.
#
#   NODE_RANK=0 NUM_NODES=2 MASTER_ADDR=node0 HF_MODEL=... DATA=... WORK_DIR=... bash examples/launchers/torchrun.sh    # on node0
#   NODE_RANK=1 NUM_NODES=2 MASTER_ADDR=node0 HF_MODEL=... DATA=... WORK_DIR=... bash examples/launchers/torchrun.sh    # on the other
#
# Where a rank fails, torchrun starts the ranks of all nodes anew, MAX_RESTARTS times at most, and the training goes on from its latest
# checkpoint. A node that is lost as a whole is none that torchrun can start anew: start this script there again, and on the others,
# whose ranks end within --distributed-timeout-minutes.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

export MAX_RESTARTS=${MAX_RESTARTS:-3}
exec bash "${SCRIPT:-$ROOT/examples/run_rmipo_llama3_8b.sh}" "$@"
