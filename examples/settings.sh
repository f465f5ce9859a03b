# shellcheck shell=bash
# shellcheck disable=SC2034 # the scripts beside this file use these variables
# What the scripts beside this file train with, unless the environment says otherwise: the paper's settings (appendix C: batch 128,
# length 2048, one epoch, Adam, cosine; SFT at 2e-5, preference learning rates searched in 3e-7 ... 1e-6), or the embedded example's.

# choose_inputs NAME LR [SHAPE]: settle the inputs, the machines and the settings; results go to work/NAME unless WORK_DIR is set. SHAPE:
# of the embedded example's model (--shape of examples/embedded/make_inputs.py).
choose_inputs() {
    local name
    if [[ -n "${STEPS:-}" && -n "${EPOCHS:-}" ]]; then die "STEPS=$STEPS and EPOCHS=$EPOCHS: set one of them"; fi
    for name in LORA_ALPHA MERGE; do
        if [[ -n "${!name:-}" && -z "${LORA_RANK:-}" ]]; then die "$name=${!name} is of an adapter, which LORA_RANK=16 trains; set both, or neither"; fi
    done
    if [[ -z "${HF_MODEL:-}" && -z "${DATA:-}" ]]; then
        use_embedded_example "${3:-}"
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
    LR=${LR:-$(learning_rate "$2")}
    EPOCHS=${EPOCHS:-1}
    SFT_LR=${SFT_LR:-2e-5}
    SFT_EPOCHS=${SFT_EPOCHS:-1}
    LOG_INTERVAL=${LOG_INTERVAL:-1}
    EVAL_INTERVAL=${EVAL_INTERVAL:-50}
    SAVE_INTERVAL=${SAVE_INTERVAL:-100}
}

# learning_rate LR: that of a training whose rate for all weights is LR. An adapter takes ten times as much, as in
# the DPO recipes of Hugging Face's alignment handbook: 5e-7 for all weights, 5e-6 for an adapter.
learning_rate() {
    if [[ -n "${LORA_RANK:-}" ]]; then awk -v rate="$1" 'BEGIN { print 10 * rate }'; else echo "$1"; fi
}

# share_over N: over how many ranks of a node to share something that wants N: as many as there are, up to N; in the embedded example
# two, where they go by twos.
share_over() {
    if [[ -n "${EMBEDDED:-}" ]]; then echo $((GPUS_PER_NODE % 2 ? 1 : 2)); else echo $((GPUS_PER_NODE < $1 ? GPUS_PER_NODE : $1)); fi
}

# set_arguments: the arguments of the trainer, once the layout is settled: TP and PP, and EP where a model has experts.
set_arguments() {
    LENGTH_ARGS=(--epochs "$EPOCHS")
    if [[ -n "${STEPS:-}" ]]; then LENGTH_ARGS=(--train-iters "$STEPS"); fi
    PP=${PP:-1}
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
    if ((${EP:-1} > 1)); then MODEL_PARALLEL_ARGS+=(--expert-model-parallel-size "$EP"); fi
    TRAINING_ARGS=(
        --global-batch-size "$GLOBAL_BATCH_SIZE"
        --seq-length "$SEQ_LENGTH"
        --tokens-per-microbatch "$TOKENS_PER_MICROBATCH"
        --lr-decay-style cosine
        --lr-warmup-fraction 0.1
        --clip-grad 1.0
        --seed 1234
    )
    LORA_ARGS=()
    if [[ -n "${LORA_RANK:-}" ]]; then LORA_ARGS=(--lora-rank "$LORA_RANK" --lora-alpha "${LORA_ALPHA:-$((2 * LORA_RANK))}"); fi
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
        "${LENGTH_ARGS[@]}"
    )
    DATA_ARGS=(
        --data-path "$WORK_DIR/data/train"
    )
    LOGGING_ARGS=(
        --log-interval "$LOG_INTERVAL"
        --eval-interval "$EVAL_INTERVAL"
        --save-interval "$SAVE_INTERVAL"
    )
}

# A small model of the given shape (Llama's without one) and preference pairs from a generator, on the GPUs that are there or over gloo
# on the CPU.
use_embedded_example() {
    echo "Neither HF_MODEL nor DATA is set: running the embedded example (a small model of random weights, generated pairs)."
    EMBEDDED=1
    SHAPE=$1
    WORK_DIR=${WORK_DIR:-work/embedded${SHAPE:+-$SHAPE}}
    set_layout
    INPUTS="$WORK_DIR/inputs"
    HF_MODEL="$INPUTS/model"
    # Set and empty: without fine-tuning first.
    SFT_DATA=${SFT_DATA-"$INPUTS/sft.jsonl"}
    DATA="$INPUTS/train.jsonl"
    VALID_DATA="$INPUTS/heldout.jsonl"
    # What the tables group the held-out pairs by; it trains nothing.
    DATA_FLAGS="--ignore-columns kind" VALID_FLAGS=$DATA_FLAGS SFT_FLAGS=$DATA_FLAGS
    # A small model shows more in fp32, and a CPU is slow in anything else.
    PRECISION_ARGS=(--no-bf16)
    SEQ_LENGTH=${SEQ_LENGTH:-256}
    TOKENS_PER_MICROBATCH=${TOKENS_PER_MICROBATCH:-4096}
    GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-32}
    SFT_LR=${SFT_LR:-2e-3}
    # Of rates for an adapter the one at which the chosen responses stay as likely as with all weights (docs/lora.md).
    if [[ -n "${LORA_RANK:-}" ]]; then LR=${LR:-1e-3}; fi
    LR=${LR:-3e-4}
    LOG_INTERVAL=${LOG_INTERVAL:-5}
    EVAL_INTERVAL=${EVAL_INTERVAL:-32}
}
