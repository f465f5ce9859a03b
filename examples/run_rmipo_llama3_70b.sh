#!/usr/bin/env bash
# Preference optimization of Llama-3-70B with RMiPO, in the paper's settings: Hugging Face model in, Hugging Face model out.
#
#   NUM_NODES=4 NODE_RANK=0 MASTER_ADDR=host0 HF_MODEL=/models/Meta-Llama-3-70B-Instruct DATA=ultrafeedback.jsonl bash examples/run_rmipo_llama3_70b.sh [flags of the trainer]
#
# LORA_RANK=16 trains an adapter instead, on one node. With neither HF_MODEL nor DATA it runs a small embedded example, a Llama of six
# layers in two pipeline stages, through the same stages. All variables: examples/stages.sh.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=examples/stages.sh
source "$ROOT/examples/stages.sh"
# shellcheck source=examples/settings.sh
source "$ROOT/examples/settings.sh"
choose_inputs llama3-70b 4e-7 llama3-70b

# 18 bytes a parameter (bf16 weights, fp32 gradients, the optimizer's), cut over the TP 8 of a node and a pipeline stage for each node:
# 40 GB of each of 32 GPUs. With an adapter 2 bytes, of the frozen weights: 18 GB of each of 8.
if [[ -n "${EMBEDDED:-}" ]]; then TP=${TP:-1} PP=${PP:-$(share_over 2)}; fi
TP=${TP:-$(share_over 8)}
PP=${PP:-$NUM_NODES}
set_arguments
run_stages "$@"
