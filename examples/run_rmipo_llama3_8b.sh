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
TP=${TP:-$((GPUS_PER_NODE < 4 ? GPUS_PER_NODE : 4))}

MODEL_ARGS=(
    "${PRECISION_ARGS[@]}"
    --attention-backend auto
)
MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)
if ((TP > 1)); then MODEL_PARALLEL_ARGS+=(--sequence-parallel); fi
TRAINING_ARGS=(
    --global-batch-size "$GLOBAL_BATCH_SIZE"
    --seq-length "$SEQ_LENGTH"
    --tokens-per-microbatch "$TOKENS_PER_MICROBATCH"
    --lr-decay-style cosine
    --lr-warmup-fraction 0.1
    --clip-grad 1.0
    --seed 1234
)
SFT_ARGS=(
    --objective sft
    --lr "$SFT_LR"
    --epochs "$SFT_EPOCHS"
)
RMIPO_ARGS=(
    --objective rmipo
    --beta 2.0
    --gamma-min 0.3
    --gamma-max 1.6
    --lr "$LR"
    --epochs "$EPOCHS"
)
DATA_ARGS=(
    --data-path "$WORK_DIR/data/train"
)
LOGGING_ARGS=(
    --log-interval "$LOG_INTERVAL"
    --eval-interval "$EVAL_INTERVAL"
    --save-interval "$SAVE_INTERVAL"
)

run_stages "$@"
