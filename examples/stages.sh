# shellcheck shell=bash
# The stages from a Hugging Face model and preference data to a trained Hugging Face model. The scripts beside this file set the
# argument arrays and call run_stages, or prepare_start and train_stage for several trainings from one start.
#
#   HF_MODEL        model directory to start from            DATA        preference data: a file or a Hugging Face data set name
#   VALID_DATA      held-out preference data (else 1 % of DATA)          DATA_SPLIT, VALID_SPLIT, SFT_SPLIT  splits of data sets
#   SFT_DATA        fine-tune on these first (the Base setting of the paper): supervised rows (messages, or prompt and completion), or
#                   preference data, of which the chosen responses count
#   CHAT_TEMPLATE   built-in template or file, where the tokenizer has none of its own; the exported tokenizer is the base model's,
#                   without it
#   WORK_DIR        where every result goes                  DRY_RUN=1   print the commands instead of running them
#   GPUS_PER_NODE NUM_NODES NODE_RANK MASTER_ADDR MASTER_PORT TP PP      the layout; WORK_DIR must be shared by the nodes
#   STAGE_TIMEOUT_MINUTES   how long the other nodes wait for a stage of the first one (240); FAILURE_GRACE_SECONDS  how long its failure
#                   may be that of an earlier start (60)      SIGNALS_REACH_ALL=1   whoever signals this script signals torchrun too
#
# A stage whose result is there and complete is skipped; a training that was interrupted goes on from its latest checkpoint. What was
# made with other settings, or from something that was, is refused. SIGTERM and SIGINT reach the trainer, which saves and ends.
# Exit status: 0 everything is there; 75 a training stopped before its end, start again to go on; else that of the command that failed.

# shellcheck source=examples/running.sh
source examples/running.sh

RUN_ONLY=()

# nproc would answer with OMP_NUM_THREADS.
count_cores() {
    getconf _NPROCESSORS_ONLN
}

count_gpus() {
    { nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l
}

# stage NAME RESULT REMOVE COMMAND...: run the command once, on the first node; RESULT is the file the command writes last, REMOVE what
# to remove to make it again. Flags in the array RUN_ONLY are added; the result does not depend on them.
stage() {
    local name=$1 result=$2 remove=$3 made=""
    shift 3
    CURRENT_STAGE=$name
    if ! is_dry; then
        if [[ -e "$result" ]]; then made=$result; fi
        check_record "$name" "$made" "rm -r $remove" "$(printf '%q ' "$@")"
    fi
    if [[ -n "$made" ]]; then
        say "$name: already there ($result)"
    elif ((NODE_RANK > 0)) && ! is_dry; then
        wait_for "$name" "$result"
    else
        say "$name"
        run "$@" "${RUN_ONLY[@]}"
    fi
}

# preprocess NAME INPUT SPLIT: prepare a preference data set at $WORK_DIR/data/NAME.
preprocess() {
    local arguments=(--input "$2" --tokenizer-model "$HF_MODEL" --output-prefix "$WORK_DIR/data/$1" --seq-length "$SEQ_LENGTH")
    local RUN_ONLY=(--workers "$WORKERS")
    if [[ -n "$3" ]]; then arguments+=(--split "$3"); fi
    if [[ -n "${CHAT_TEMPLATE:-}" ]]; then arguments+=(--chat-template "$CHAT_TEMPLATE"); fi
    if ((NODE_RANK == 0)) && ! is_dry; then mkdir -p "$WORK_DIR/data"; fi
    stage "preprocess $1" "$WORK_DIR/data/$1.json" "$WORK_DIR/data/$1.*" python tools/preprocess_preferences.py "${arguments[@]}"
}

# what_trains FLAGS...: those on which the trained model depends. The others may change between two starts of one training.
what_trains() {
    while (($#)); do
        case $1 in
            --debug) ;;
            --exit-interval | --log-interval | --save-interval | --keep-last | --eval-interval | --num-workers | --log-dir | \
                --tensorboard-dir | --wandb-project | --wandb-exp-name | --distributed-timeout-minutes | --reference-cache) shift ;;
            --exit-interval=* | --log-interval=* | --save-interval=* | --keep-last=* | --eval-interval=* | --num-workers=* | \
                --log-dir=* | --tensorboard-dir=* | --wandb-project=* | --wandb-exp-name=* | --distributed-timeout-minutes=* | \
                --reference-cache=*) ;;
            *) printf '%q ' "$1" ;;
        esac
        if (($#)); then shift; fi
    done
}

# has_checkpoint DIR: whether a training has saved there; a folder of a run that died while it wrote it is none.
has_checkpoint() {
    local path
    for path in "$1/latest_checkpointed_iteration.txt" "$1"/iter_*; do
        if [[ -e "$path" && "$path" != *.incomplete ]]; then return; fi
    done
    return 1
}

# train_stage NAME FROM EXPORT UPSTREAM FLAGS...: train from the checkpoint FROM into $WORK_DIR/NAME; the trainer writes the Hugging Face
# model to EXPORT when it has reached its last step, and not before. UPSTREAM: stages it starts from, in lines. Returns the trainer's
# status where it failed.
train_stage() {
    local name="train $1" from=$2 export=$3 save="$WORK_DIR/$1" upstream made="" load
    mapfile -t upstream <<<"$4"
    shift 4
    CURRENT_STAGE=$name
    load=(--load "$from" --finetune)
    if ! is_dry; then
        if [[ -e "$export/config.json" ]]; then made=$export; fi
        if has_checkpoint "$save"; then
            made=$save
            load=(--load "$save")
        fi
        # Its latest checkpoint would be exported again if the export alone were removed.
        check_record "$name" "$made" "rm -r $save $export" \
            "$(what_trains "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "$@" && echo && records_of "${upstream[@]}")"
        if [[ -e "$export/config.json" ]]; then
            say "$name: already there ($export)"
            return
        fi
        if ((NODE_RANK == 0)) && [[ -z "$made" ]]; then rm -rf "$save"/iter_*.incomplete; fi
    fi
    if [[ -n "$made" ]]; then say "$name: goes on from the latest checkpoint of $save"; else say "$name"; fi
    run torchrun "${DISTRIBUTED_ARGS[@]}" -m megatron_rmipo.train \
        "${MODEL_ARGS[@]}" "${MODEL_PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${LOGGING_ARGS[@]}" \
        "${load[@]}" --save "$save" --save-hf "$export" "$@" || return
    if ! is_dry && ! appears "$export/config.json"; then
        say "$name: stopped before its end; start this script again to go on"
        exit "$EX_TEMPFAIL"
    fi
}

# appears FILE: whether it is there; on another node than the one that wrote it, that may take some seconds.
appears() {
    local tries=$((NODE_RANK > 0 ? 10 : 0))
    until [[ -e "$1" ]]; do
        if ((tries-- == 0)); then return 1; fi
        sleep 1
    done
}

# prepare_start: everything a preference training starts from. Sets START (checkpoint directory), SOURCES (the stages that made what it
# reads, in lines) and HELD_OUT (flags).
prepare_start() {
    export CUDA_DEVICE_MAX_CONNECTIONS=1
    # Every rank would repeat what Megatron-Core says at import of packages it can do without.
    export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore}
    # torchrun kills ranks that take longer than this (seconds) to save after SIGTERM; its default is 30.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-270}
    handle_signals
    local sources="convert the model" valid=""
    HELD_OUT=(--split "99,1")
    START="$WORK_DIR/base"
    if [[ -n "${EMBEDDED:-}" ]]; then
        stage "make the embedded inputs" "$HF_MODEL/config.json" "$INPUTS" \
            python examples/embedded/make_inputs.py --output "$INPUTS" --seed 1
    elif ! is_dry && [[ ! -e "$HF_MODEL/config.json" ]]; then
        die "HF_MODEL=$HF_MODEL: no config.json there; name the directory of a Hugging Face model"
    fi
    preprocess train "$DATA" "${DATA_SPLIT:-}"
    if [[ -n "${VALID_DATA:-}" ]]; then
        preprocess valid "$VALID_DATA" "${VALID_SPLIT:-}"
        valid=$'\npreprocess valid'
        HELD_OUT=(--valid-data-path "$WORK_DIR/data/valid")
    fi
    stage "convert the model" "$START/latest_checkpointed_iteration.txt" "$START" \
        python tools/convert_hf_to_megatron.py --hf-model "$HF_MODEL" --save "$START"
    if [[ -n "${SFT_DATA:-}" ]]; then
        preprocess sft "$SFT_DATA" "${SFT_SPLIT:-}"
        train_stage sft "$START" "$WORK_DIR/sft-hf" "$sources"$'\n'"preprocess sft$valid" \
            "${SFT_ARGS[@]}" --data-path "$WORK_DIR/data/sft" "${HELD_OUT[@]}"
        START="$WORK_DIR/sft" sources="train sft"
    fi
    SOURCES="$sources"$'\n'"preprocess train$valid"
}

# run_stages FLAGS...: everything; the flags go to the preference training.
run_stages() {
    prepare_start
    train_stage rmipo "$START" "$WORK_DIR/hf" "$SOURCES" "${RMIPO_ARGS[@]}" "${DATA_ARGS[@]}" "${HELD_OUT[@]}" "$@"
    if ((NODE_RANK == 0)); then
        CURRENT_STAGE="result"
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
