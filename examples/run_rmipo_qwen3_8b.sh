#!/usr/bin/env bash
# Preference optimization of Qwen3-8B with RMiPO, in the paper's settings: Hugging Face model in, Hugging Face model out.
#
#   HF_MODEL=/models/Qwen3-8B DATA=ultrafeedback.jsonl bash examples/run_rmipo_qwen3_8b.sh [flags of the trainer]
#
# Qwen3 has no token that begins a sequence; the data tool says which one stands there in log p(y). Nothing of a response's reasoning is
# left out or added: its template decides. With neither HF_MODEL nor DATA it runs a small embedded example, a Qwen3 of four layers,
# through the same stages. All variables: examples/stages.sh.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=examples/stages.sh
source "$ROOT/examples/stages.sh"
# shellcheck source=examples/settings.sh
source "$ROOT/examples/settings.sh"
choose_inputs qwen3-8b 6e-7 qwen3

# 6 bytes a parameter (bf16 weights, fp32 gradients) over TP, and 12 of the optimizer over all GPUs: TP 4 fits 4 or 8 GPUs of 80 GB.
TP=${TP:-$(share_over 4)}
set_arguments
run_stages "$@"
