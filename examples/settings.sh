# shellcheck shell=bash
# shellcheck disable=SC2034 # the scripts beside this file use these variables
# What the scripts beside this file train with, unless the environment says otherwise: the paper's settings (appendix C: batch 128,
# length 2048, one epoch, Adam, cosine; SFT at 2e-5, preference learning rates searched in 3e-7 ... 1e-6), or the embedded example's.

# choose_inputs NAME LR: settle the inputs, the layout and the settings; results go to work/NAME unless WORK_DIR is set.
choose_inputs() {
    if [[ -z "${HF_MODEL:-}" && -z "${DATA:-}" ]]; then
        use_embedded_example
    elif [[ -z "${HF_MODEL:-}" || -z "${DATA:-}" ]]; then
        die "HF_MODEL (a Hugging Face model directory) and DATA (preference data) go together; set both or neither"
    else
        WORK_DIR=${WORK_DIR:-work/$1}
        PRECISION_ARGS=(--bf16)
        set_layout
    fi
    SEQ_LENGTH=${SEQ_LENGTH:-2048}
    TOKENS_PER_MICROBATCH=${TOKENS_PER_MICROBATCH:-8192}
    GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-128}
    LR=${LR:-$2}
    EPOCHS=${EPOCHS:-1}
    SFT_LR=${SFT_LR:-2e-5}
    SFT_EPOCHS=${SFT_EPOCHS:-1}
    LOG_INTERVAL=${LOG_INTERVAL:-1}
    EVAL_INTERVAL=${EVAL_INTERVAL:-50}
    SAVE_INTERVAL=${SAVE_INTERVAL:-100}
}

# A small Llama-3-shaped model and preference pairs from a generator: TP 2, on the GPUs that are there or over gloo on the CPU.
use_embedded_example() {
    echo "Neither HF_MODEL nor DATA is set: running the embedded example (a small model of random weights, generated pairs)."
    EMBEDDED=1
    WORK_DIR=${WORK_DIR:-work/embedded}
    set_layout
    INPUTS="$WORK_DIR/inputs"
    HF_MODEL="$INPUTS/model"
    SFT_DATA="$INPUTS/sft.jsonl"
    DATA="$INPUTS/train.jsonl"
    VALID_DATA="$INPUTS/heldout.jsonl"
    # What the tables group the held-out pairs by; it trains nothing.
    DATA_FLAGS="--ignore-columns kind" VALID_FLAGS=$DATA_FLAGS SFT_FLAGS=$DATA_FLAGS
    TP=${TP:-$((GPUS_PER_NODE % 2 ? 1 : 2))}
    # A small model shows more in fp32, and a CPU is slow in anything else.
    PRECISION_ARGS=(--no-bf16)
    SEQ_LENGTH=${SEQ_LENGTH:-256}
    TOKENS_PER_MICROBATCH=${TOKENS_PER_MICROBATCH:-4096}
    GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-32}
    SFT_LR=${SFT_LR:-2e-3}
    LR=${LR:-3e-4}
    LOG_INTERVAL=${LOG_INTERVAL:-5}
    EVAL_INTERVAL=${EVAL_INTERVAL:-20}
}
