#!/usr/bin/env bash
# Preference optimization of a real model at the size of a laptop: SmolLM2-135M-Instruct with RMiPO, on a few dozen short pairs. Below
# 30 minutes on two CPU cores, minutes on a GPU; it shows how margins move and what one step costs, not what the method is worth.
#
#   DATA=ultrafeedback.jsonl bash examples/run_rmipo_smollm2.sh [flags of the trainer]
#   DATA=... HF_MODEL=/models/SmolLM2-135M-Instruct WORK_DIR=work/paper bash examples/run_rmipo_smollm2.sh --preset paper
#
# Without HF_MODEL the model is downloaded from the Hugging Face hub, once (270 MB). DATA: preference pairs like UltraFeedback's, a
# file or a data set's name; pairs of more than SEQ_LENGTH (256) tokens are left out, and a fifth of the rest is held out, of which the
# first EVAL_PAIRS (64) are evaluated (VALID_DATA: others). STEPS (12) steps of GLOBAL_BATCH_SIZE (8) pairs. All other variables:
# examples/stages.sh.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=examples/stages.sh
source "$ROOT/examples/stages.sh"
# shellcheck source=examples/settings.sh
source "$ROOT/examples/settings.sh"
HUB_MODEL=HuggingFaceTB/SmolLM2-135M-Instruct
if [[ -z "${DATA:-}" ]]; then die "DATA: give preference pairs, a file or the name of a data set on the Hugging Face hub"; fi
WORK_DIR=${WORK_DIR:-work/smollm2}
DOWNLOADED="$WORK_DIR/model"
HF_MODEL=${HF_MODEL:-$DOWNLOADED}
SEQ_LENGTH=${SEQ_LENGTH:-256}
OVERLONG=${OVERLONG:-drop}
HELD_OUT_SPLIT=${HELD_OUT_SPLIT:-80,20}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-8}
TOKENS_PER_MICROBATCH=${TOKENS_PER_MICROBATCH:-2048}
if [[ -z "${EPOCHS:-}" ]]; then STEPS=${STEPS:-12}; fi
# Before and after.
EVAL_INTERVAL=${EVAL_INTERVAL:-0}
choose_inputs smollm2 1e-5

# Three key/value heads: TP 1 or 3.
TP=${TP:-1}
# A CPU is slow in anything but fp32.
if (($(count_gpus) == 0)); then PRECISION_ARGS=(--no-bf16); fi

set_arguments
RMIPO_ARGS+=(--eval-pairs "${EVAL_PAIRS:-64}")

# A download that was cut short goes on; only a whole one gets the name.
if [[ "$HF_MODEL" == "$DOWNLOADED" && ! -e "$HF_MODEL/config.json" ]]; then
    say "download $HUB_MODEL"
    if ! is_dry && ! command -v hf >/dev/null; then
        die "hf, the command of the package huggingface_hub, is not on the PATH: activate the environment this project is installed in,
  or set HF_MODEL to a directory that holds $HUB_MODEL"
    fi
    run hf download "$HUB_MODEL" --local-dir "$HF_MODEL.incomplete" --exclude "onnx/*" ||
        die "$HUB_MODEL could not be downloaded; where there is no network, set HF_MODEL to a directory that holds it"
    run mv "$HF_MODEL.incomplete" "$HF_MODEL"
fi
run_stages "$@"
