#!/usr/bin/env bash
# Preference optimization of Gemma-3-12B with RMiPO, in the paper's settings: Hugging Face model in, Hugging Face model out.
#
#   HF_MODEL=/models/gemma-3-12b-text DATA=ultrafeedback.jsonl bash examples/run_rmipo_gemma3_12b.sh [flags of the trainer]
#
# Of the released checkpoints the language model alone is trained; save it first (docs/checkpoints.md). With neither HF_MODEL nor DATA
# it runs a small embedded example, a Gemma 3 of six layers, through the same stages. All variables: examples/stages.sh.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=examples/stages.sh
source "$ROOT/examples/stages.sh"
# shellcheck source=examples/settings.sh
source "$ROOT/examples/settings.sh"
choose_inputs gemma3-12b 5e-7 gemma3

# 6 bytes a parameter (bf16 weights, fp32 gradients) over TP, and 12 of the optimizer over all GPUs: TP 8 takes 27 GB of each of 8.
TP=${TP:-$(share_over 8)}
set_arguments
run_stages "$@"
