#!/usr/bin/env bash
# Preference optimization of Llama-3-8B with RMiPO, in the paper's settings: Hugging Face model in, Hugging Face model out.
#
#   HF_MODEL=/models/Meta-Llama-3-8B-Instruct DATA=ultrafeedback.jsonl bash examples/run_rmipo_llama3_8b.sh [flags of the trainer]
#
# Base setting: HF_MODEL=/models/Meta-Llama-3-8B CHAT_TEMPLATE=llama3 SFT_DATA=... DATA=... With neither HF_MODEL nor DATA it runs a
# small embedded example through the same stages. All variables: examples/stages.sh.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=examples/stages.sh
source "$ROOT/examples/stages.sh"
# shellcheck source=examples/settings.sh
source "$ROOT/examples/settings.sh"
choose_inputs llama3-8b 6e-7

# 6 bytes a parameter (bf16 weights, fp32 gradients) over TP, and 12 of the optimizer over all GPUs: TP 4 fits 4 or 8 GPUs of 80 GB.
TP=${TP:-$(share_over 4)}
set_arguments
run_stages "$@"
