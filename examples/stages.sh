# shellcheck shell=bash
# The stages from a Hugging Face model and preference data to a trained Hugging Face model. The scripts beside this file set the
# argument arrays and call run_stages.
#
#   HF_MODEL        model directory to start from            DATA        preference data: a file or a Hugging Face data set name
#   VALID_DATA      held-out preference data (else 1 % of DATA)          DATA_SPLIT, VALID_SPLIT, SFT_SPLIT  splits of data sets
#   SFT_DATA        fine-tune on the chosen responses of these first (the Base setting of the paper)
#   CHAT_TEMPLATE   built-in template or file, where the tokenizer has none of its own
#   WORK_DIR        where every result goes                  DRY_RUN=1   print the commands instead of running them
#   GPUS_PER_NODE NUM_NODES NODE_RANK MASTER_ADDR MASTER_PORT TP PP      the layout; WORK_DIR must be shared by the nodes
#
# A stage whose result is there and complete is skipped; a training that was interrupted goes on from its latest checkpoint.

die() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

say() {
    echo "== $*"
}

# Run a command, or print it where DRY_RUN is set.
run() {
    if [[ -n "${DRY_RUN:-}" ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

# nproc would answer with OMP_NUM_THREADS.
count_cores() {
    getconf _NPROCESSORS_ONLN
}

count_gpus() {
    { nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l
}

# is_complete NAME RESULT COMMAND...: whether RESULT is there, made by this command; what another command made is not used silently.
is_complete() {
    local record="$WORK_DIR/.stages/${1// /-}" result=$2 command
    shift 2
    if [[ -n "${DRY_RUN:-}" ]]; then return 1; fi
    command=$(printf '%q ' "$@")
    if [[ ! -e "$result" ]]; then
        mkdir -p "$WORK_DIR/.stages"
        echo "$command" >"$record"
        return 1
    fi
    if [[ -e "$record" && "$(<"$record")" != "$command" ]]; then
        die "$result was made with other settings:
  then: $(<"$record")
  now:  $command
Set WORK_DIR to another directory, or remove $(dirname "$result") to make it again."
    fi
}

# stage NAME RESULT COMMAND...: run the command once, on the first node; RESULT is the file the command writes last.
stage() {
    local name=$1 result=$2
    if is_complete "$@"; then
        say "$name: already there ($result)"
    elif ((NODE_RANK > 0)) && [[ -z "${DRY_RUN:-}" ]]; then
        say "$name: waiting for the first node to write $result"
        until [[ -e "$result" ]]; do sleep 5; done
    else
        say "$name"
        run "${@:3}"
    fi
}

# preprocess NAME INPUT SPLIT: prepare a preference data set at $WORK_DIR/data/NAME.
preprocess() {
    local arguments=(--input "$2" --tokenizer-model "$HF_MODEL" --output-prefix "$WORK_DIR/data/$1"
        --seq-length "$SEQ_LENGTH" --workers "$WORKERS")
    if [[ -n "$3" ]]; then arguments+=(--split "$3"); fi
    if [[ -n "${CHAT_TEMPLATE:-}" ]]; then arguments+=(--chat-template "$CHAT_TEMPLATE"); fi
    if [[ -z "${DRY_RUN:-}" && "$NODE_RANK" == 0 ]]; then mkdir -p "$WORK_DIR/data"; fi
    stage "preprocess $1" "$WORK_DIR/data/$1.json" python tools/preprocess_preferences.py "${arguments[@]}"
}

# train_stage NAME FROM EXPORT FLAGS...: train from the checkpoint FROM into $WORK_DIR/NAME; the trainer writes the Hugging Face model
# to EXPORT when it has reached its last step, and not before.
train_stage() {
    local name=$1 from=$2 export=$3
    local save="$WORK_DIR/$name"
    shift 3
    # The layout may change between two starts of one training, so it is no part of what is compared.
    if is_complete "train $name" "$export/config.json" "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "$@"; then
        say "train $name: already there ($export)"
        return
    fi
    local load=(--load "$from" --finetune)
    if [[ -z "${DRY_RUN:-}" && -e "$save/latest_checkpointed_iteration.txt" ]]; then
        say "train $name: goes on from iteration $(<"$save/latest_checkpointed_iteration.txt")"
        load=(--load "$save")
    else
        say "train $name"
    fi
    run torchrun "${DISTRIBUTED_ARGS[@]}" -m megatron_rmipo.train \
        "${MODEL_ARGS[@]}" "${MODEL_PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${LOGGING_ARGS[@]}" \
        "${load[@]}" --save "$save" --save-hf "$export" "$@"
    if [[ -z "${DRY_RUN:-}" && ! -e "$export/config.json" ]]; then
        say "train $name: stopped before its end; start this script again to go on"
        exit 0
    fi
}

# run_stages FLAGS...: everything; the flags go to the preference training.
run_stages() {
    export CUDA_DEVICE_MAX_CONNECTIONS=1
    # Every rank would repeat what Megatron-Core says at import of packages it can do without.
    export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore}
    if [[ -n "${EMBEDDED:-}" ]]; then
        stage "make the embedded inputs" "$HF_MODEL/config.json" \
            python examples/embedded/make_inputs.py --output "$INPUTS" --seed 1
    elif [[ -z "${DRY_RUN:-}" && ! -e "$HF_MODEL/config.json" ]]; then
        die "HF_MODEL=$HF_MODEL: no config.json there; name the directory of a Hugging Face model"
    fi
    preprocess train "$DATA" "${DATA_SPLIT:-}"
    local held_out=(--split "99,1") start="$WORK_DIR/base"
    if [[ -n "${VALID_DATA:-}" ]]; then
        preprocess valid "$VALID_DATA" "${VALID_SPLIT:-}"
        held_out=(--valid-data-path "$WORK_DIR/data/valid")
    fi
    stage "convert the model" "$start/latest_checkpointed_iteration.txt" \
        python tools/convert_hf_to_megatron.py --hf-model "$HF_MODEL" --save "$start"
    if [[ -n "${SFT_DATA:-}" ]]; then
        preprocess sft "$SFT_DATA" "${SFT_SPLIT:-}"
        train_stage sft "$start" "$WORK_DIR/sft-hf" "${SFT_ARGS[@]}" --data-path "$WORK_DIR/data/sft" "${held_out[@]}"
        start="$WORK_DIR/sft"
    fi
    train_stage rmipo "$start" "$WORK_DIR/hf" "${RMIPO_ARGS[@]}" "${DATA_ARGS[@]}" "${held_out[@]}" "$@"
    if ((NODE_RANK == 0)); then
        say "result"
        local rows=()
        if [[ -n "${EMBEDDED:-}" ]]; then rows=(--rows "$VALID_DATA"); fi
        run python tools/summarize_run.py --log-dir "$WORK_DIR/rmipo/logs" --model "$WORK_DIR/hf" "${rows[@]}"
    fi
}

# Where to run: the GPUs of each node, or two processes over gloo on the CPU.
set_layout() {
    local gpus
    gpus=$(count_gpus)
    GPUS_PER_NODE=${GPUS_PER_NODE:-$((gpus > 0 ? gpus : 2))}
    NUM_NODES=${NUM_NODES:-1}
    NODE_RANK=${NODE_RANK:-0}
    MASTER_ADDR=${MASTER_ADDR:-localhost}
    # Runs beside each other on one machine must not meet on one port; several nodes must agree on one.
    MASTER_PORT=${MASTER_PORT:-$((NUM_NODES > 1 ? 6000 : 20000 + $$ % 20000))}
    PP=${PP:-1}
    if ((gpus == 0)); then
        local threads=$(($(count_cores) / GPUS_PER_NODE))
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
    fi
    WORKERS=${WORKERS:-$(count_cores)}
    DISTRIBUTED_ARGS=(
        --nproc-per-node "$GPUS_PER_NODE"
        --nnodes "$NUM_NODES"
        --node-rank "$NODE_RANK"
        --master-addr "$MASTER_ADDR"
        --master-port "$MASTER_PORT"
    )
    if ! command -v torchrun >/dev/null && [[ -x .venv/bin/torchrun ]]; then
        PATH="$PWD/.venv/bin:$PATH"
    fi
    if [[ -z "${DRY_RUN:-}" ]] && ! command -v torchrun >/dev/null; then
        die "torchrun is not on the PATH: run 'make venv', or activate the environment this project is installed in"
    fi
}
