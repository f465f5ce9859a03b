#!/usr/bin/env bash
# Preference optimization of Mistral-7B with RMiPO, in the paper's settings: Hugging Face model in, Hugging Face model out.
#
#   HF_MODEL=/models/Mistral-7B-Instruct-v0.2 DATA=ultrafeedback.jsonl bash examples/run_rmipo_mistral_7b.sh [flags of the trainer]
#
# Base setting: HF_MODEL=/models/Mistral-7B-v0.1 CHAT_TEMPLATE=zephyr SFT_DATA=... DATA=... (its sliding window of 4096 tokens is not
# reached at length 2048). With neither HF_MODEL nor DATA it runs a small embedded example through the same stages. All variables:
# examples/stages.sh.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=examples/stages.sh
source "$ROOT/examples/stages.sh"
# shellcheck source=examples/settings.sh
source "$ROOT/examples/settings.sh"
choose_inputs mistral-7b 5e-7

# 6 bytes a parameter (bf16 weights, fp32 gradients) over TP, and 12 of the optimizer over all GPUs: TP 4 fits 4 or 8 GPUs of 80 GB.
TP=${TP:-$(share_over 4)}
set_arguments
run_stages "$@"
