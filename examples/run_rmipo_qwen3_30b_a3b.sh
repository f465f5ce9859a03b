#!/usr/bin/env bash
# Preference optimization of Qwen3-30B-A3B with RMiPO, in the paper's settings: Hugging Face model in, Hugging Face model out.
#
#   NUM_NODES=2 NODE_RANK=0 MASTER_ADDR=host0 HF_MODEL=/models/Qwen3-30B-A3B DATA=ultrafeedback.jsonl bash examples/run_rmipo_qwen3_30b_a3b.sh [flags of the trainer]
#
# 128 experts a layer, of which a token goes through 8. With neither HF_MODEL nor DATA it runs a small embedded example, a Qwen3-MoE of
# four layers with 8 experts, through the same stages. All variables: examples/stages.sh.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=examples/stages.sh
source "$ROOT/examples/stages.sh"
# shellcheck source=examples/settings.sh
source "$ROOT/examples/settings.sh"
choose_inputs qwen3-30b-a3b 6e-7 qwen3-moe

# 29 of its 30.5 billion parameters are experts': 6 bytes each (bf16 weights, fp32 gradients) over EP, and 12 of the optimizer over all
# GPUs. EP 8 on two nodes of 8 GPUs takes 54 GB of each; one node would take 77.
TP=${TP:-1}
EP=${EP:-$(share_over 8)}
set_arguments
run_stages "$@"
