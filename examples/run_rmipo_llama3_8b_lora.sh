#!/usr/bin/env bash
# Preference optimization of Llama-3-8B with RMiPO and LoRA: Hugging Face model in, PEFT adapter out.
#
#   HF_MODEL=/models/Meta-Llama-3-8B-Instruct DATA=ultrafeedback.jsonl bash examples/run_rmipo_llama3_8b_lora.sh [flags of the trainer]
#   MERGE=1 HF_MODEL=... DATA=... bash examples/run_rmipo_llama3_8b_lora.sh     # also a whole model, WORK_DIR/merged-hf
#
# The adapter goes to WORK_DIR/adapter, beside what run_rmipo_llama3_8b.sh writes there. LORA_RANK (16), LORA_ALPHA (twice the rank), LR
# (6e-6, ten times that of all weights); all linear layers, unless --lora-target-modules says otherwise. What it learned, besides the
# summary at the end: MERGE=1, and examples/evaluate.sh with WORK_DIR/merged-hf and HF_MODEL. With neither HF_MODEL nor DATA it runs a small
# embedded example through the same stages. All variables: examples/stages.sh.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
LORA_RANK=${LORA_RANK:-16}
# shellcheck source=examples/stages.sh
source "$ROOT/examples/stages.sh"
# shellcheck source=examples/settings.sh
source "$ROOT/examples/settings.sh"
choose_inputs llama3-8b 6e-7

# Frozen weights are 2 bytes a parameter, without gradients and optimizer: by estimate 16 GB and 42 of activations on a GPU of 80 GB at
# TP 1. TP=2 for GPUs of 40 GB, and --tokens-per-microbatch 4096.
if [[ -n "${EMBEDDED:-}" ]]; then TP=${TP:-$(share_over 2)}; fi
TP=${TP:-1}
set_arguments
run_stages "$@"
