# shellcheck shell=bash
# The stages from a Hugging Face model and preference data to a trained Hugging Face model. The scripts beside this file set the
# argument arrays and call run_stages, or prepare_start and train_stage for several trainings from one start.
#
#   HF_MODEL        model directory to start from            DATA        preference data: what --input takes (docs/data.md)
#   VALID_DATA      held-out preference data (else a part of DATA, HELD_OUT_SPLIT: 99,1)
#   DATA_SPLIT, VALID_SPLIT, SFT_SPLIT  splits of data sets   OVERLONG  what becomes of longer pairs (preprocess_preferences.py)
#   DATA_FLAGS, VALID_FLAGS, SFT_FLAGS  further flags of preprocess_preferences.py for each, such as "--columns prompt=question"
#   SFT_DATA        fine-tune on these first (the Base setting of the paper): supervised rows (messages, or prompt and completion), or
#                   preference data, of which the chosen responses count
#   STEPS or EPOCHS length of the preference training (one epoch)
#   LORA_RANK       train a LoRA adapter of this rank instead of all weights; LORA_ALPHA (twice the rank). Fine-tuning on SFT_DATA still trains
#                   all weights, and the adapter is of that model. MERGE=1   also merge it into a Hugging Face model
#   EMBEDDED_FLAGS  of examples/embedded/make_inputs.py, for the embedded example
#   CHAT_TEMPLATE   built-in template or file, where the tokenizer has none of its own; the exported model carries it
#   PUSH_TO_HUB     OWNER/NAME: show what of the model would go there on the Hugging Face Hub; PUSH_YES=1 sends it (token: HF_TOKEN)
#   WORK_DIR        where every result goes                  DRY_RUN=1   print the commands instead of running them
#   GPUS_PER_NODE NUM_NODES NODE_RANK MASTER_ADDR MASTER_PORT TP PP EP   the layout; WORK_DIR must be shared by the nodes
#   MAX_RESTARTS    how often torchrun starts the ranks of a node anew where one has failed (0); the same on all nodes
#   Relative paths are read from where the script is started.
#   STAGE_TIMEOUT_MINUTES   how long the other nodes wait for a stage of the first one (240); FAILURE_GRACE_SECONDS  how long its failure
#                   may be that of an earlier start (60)
#
# A stage whose result is there and complete is skipped; a training that was interrupted goes on from its latest checkpoint. What was
# made with other settings, from other contents of its inputs, or from something that was, is refused. SIGTERM and SIGINT reach the
# trainer, which saves and ends. Exit status: 0 everything is there; 75 stopped before the end, start again to go on; else that of the
# command that failed (docs/training.md has a table).

# shellcheck source=examples/running.sh
source "$ROOT/examples/running.sh"

export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
RUN_ONLY=()

# nproc would answer with OMP_NUM_THREADS.
count_cores() {
    getconf _NPROCESSORS_ONLN
}

count_gpus() {
    { nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l
}

# stage NAME RESULT REMOVE COMMAND...: run the command once, on the first node; RESULT is the file the command writes last, REMOVE what
# to remove to make it again. The array MADE_FROM says what the result depends on, as flags of megatron_rmipo.stage_record. Flags in
# the array RUN_ONLY are added; the result does not depend on them.
stage() {
    local name=$1 result=$2 remove=$3 made=""
    shift 3
    CURRENT_STAGE=$name
    if ! is_dry; then
        if [[ -e "$result" ]]; then made=$result; fi
        check_record "$name" "$made" "rm -r $remove" "${MADE_FROM[@]}"
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

# preprocess NAME INPUT SPLIT FLAGS: prepare a preference data set at $WORK_DIR/data/NAME.
preprocess() {
    local arguments=(--input "$2" --tokenizer-model "$HF_MODEL" --output-prefix "$WORK_DIR/data/$1" --seq-length "$SEQ_LENGTH")
    local RUN_ONLY=(--workers "$WORKERS") MADE_FROM=("--input=data=$2" "--tokenizer=tokenizer of=$HF_MODEL")
    MADE_FROM+=("--setting=--seq-length $SEQ_LENGTH" "--setting=--split ${3:-none}")
    if [[ -n "$3" ]]; then arguments+=(--split "$3"); fi
    if [[ -n "$4" ]]; then
        local flags
        read -ra flags <<<"$4"
        arguments+=("${flags[@]}")
        MADE_FROM+=("--setting=${flags[*]}")
    fi
    if [[ -n "${OVERLONG:-}" ]]; then
        arguments+=(--overlong "$OVERLONG")
        MADE_FROM+=("--setting=--overlong $OVERLONG")
    fi
    if [[ -n "${CHAT_TEMPLATE:-}" ]]; then
        arguments+=(--chat-template "$CHAT_TEMPLATE")
        MADE_FROM+=("--input=chat template=$CHAT_TEMPLATE")
    fi
    if ((NODE_RANK == 0)) && ! is_dry; then mkdir -p "$WORK_DIR/data"; fi
    stage "preprocess $1" "$WORK_DIR/data/$1.json" "$WORK_DIR/data/$1.*" python "$ROOT/tools/preprocess_preferences.py" "${arguments[@]}"
}

# what_trains FLAGS...: those on which the trained model depends, each with its values a setting in MADE_FROM. The others, such as the
# layout, may change between two starts of one training.
what_trains() {
    local settings=() name
    while (($#)); do
        name=${1%%=*}
        case ${name/#--no-/--} in
            --*-parallel-size | --*-pipeline-* | --cp-comm-type | --sequence-parallel | --use-distributed-optimizer | \
                --num-distributed-optimizer-instances | --overlap-* | --distributed-* | --check-links | --hf-read | \
                --tokens-per-microbatch | --min-microbatches-per-stage | --logprob-chunk-size | --recompute-* | \
                --fine-grained-activation-offloading | --offload-modules | --min-offloaded-tensor-size | \
                --exit-interval | --eval-interval | --save-interval | --async-save | --keep-last | --verify-checkpoint | \
                --log-interval | --log-dir | --report | --log-expert-load | --tensorboard-dir | --wandb-* | --mlflow-* | --sample-* | --debug | \
                --profile | --profile-* | --record-memory-history | --num-workers | --reference-cache)
                # With what follows it.
                while (($# > 1)) && [[ $2 != --* ]]; do shift; done
                ;;
            --config | --reference-hf | --reference-load)
                # Known by its contents.
                if [[ $1 == *=* ]]; then
                    MADE_FROM+=("--input=${1%%=*}=${1#*=}")
                else
                    MADE_FROM+=("--input=$1=${2:-}")
                    shift
                fi
                ;;
            --*) settings+=("$1") ;;
            *) settings[-1]+=" $1" ;;
        esac
        if (($#)); then shift; fi
    done
    settings=("${settings[@]//"$WORK_DIR"/WORK_DIR}")
    MADE_FROM+=("${settings[@]/#/--setting=}")
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
# model to EXPORT when it has reached its last step, and not before. With LORA_ARGS it trains an adapter of the Hugging Face model FROM, and
# EXPORT is the adapter. UPSTREAM: stages it starts from, in lines. Returns the trainer's status where it failed, and ends the script
# where it was stopped.
train_stage() {
    local name="train $1" from=$2 export=$3 save="$WORK_DIR/$1" upstream made="" load status=0 MADE_FROM=()
    local begin=(--load "$from" --finetune) base=() outputs=(--save-hf "$export") written="$export/config.json"
    if ((${#LORA_ARGS[@]})); then
        # Checkpoints hold the adapter alone: every start names the model beneath.
        begin=() base=(--load-hf "$from") outputs=(--save-adapter "$export") written="$export/adapter_config.json"
        MADE_FROM+=("--input=model=$from")
    fi
    mapfile -t upstream <<<"$4"
    shift 4
    CURRENT_STAGE=$name
    load=("${begin[@]}")
    if ! is_dry; then
        if [[ -e "$written" ]]; then made=$export; fi
        if has_checkpoint "$save"; then
            made=$save
            load=(--load "$save")
        fi
        # Its latest checkpoint would be exported again if the export alone were removed.
        what_trains "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${LORA_ARGS[@]}" "$@"
        made_from_stages "${upstream[@]}"
        check_record "$name" "$made" "rm -r $save $export" "${MADE_FROM[@]}"
        if [[ -e "$written" ]]; then
            say "$name: already there ($export)"
            return
        fi
        if ((NODE_RANK == 0)) && [[ -z "$made" ]]; then rm -rf "$save"/iter_*.incomplete; fi
    fi
    if [[ -n "$made" ]]; then say "$name: goes on from the latest checkpoint of $save"; else say "$name"; fi
    SAVED_IN=$save
    run python -m megatron_rmipo.launch "${DISTRIBUTED_ARGS[@]}" -m megatron_rmipo.train \
        "${MODEL_ARGS[@]}" "${MODEL_PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${LORA_ARGS[@]}" "${LOGGING_ARGS[@]}" \
        "${base[@]}" "${load[@]}" --save "$save" "${outputs[@]}" "$@" || status=$?
    if ((status == EX_TEMPFAIL)); then stop_here "stopped before its end"; fi
    SAVED_IN=""
    return "$status"
}

# prepare_start: everything a preference training starts from. Sets START (checkpoint directory; for an adapter, the Hugging Face model that
# it is of), SOURCES (the stages that made what it reads, in lines) and HELD_OUT (flags).
prepare_start() {
    export CUDA_DEVICE_MAX_CONNECTIONS=1
    handle_signals
    local sources="convert the model" valid="" MADE_FROM=()
    HELD_OUT=(--split "${HELD_OUT_SPLIT:-99,1}")
    START="$WORK_DIR/base"
    if [[ -n "${EMBEDDED:-}" ]]; then
        local flags=(--seed 1)
        if [[ -n "${SHAPE:-}" ]]; then flags+=(--shape "$SHAPE"); fi
        if [[ -n "${EMBEDDED_FLAGS:-}" ]]; then read -ra flags <<<"${flags[*]} $EMBEDDED_FLAGS"; fi
        MADE_FROM=("--setting=${flags[*]}")
        stage "make the embedded inputs" "$HF_MODEL/config.json" "$INPUTS" \
            python "$ROOT/examples/embedded/make_inputs.py" --output "$INPUTS" "${flags[@]}"
    elif ! is_dry && [[ ! -e "$HF_MODEL/config.json" ]]; then
        die_without_model HF_MODEL
    fi
    preprocess train "$DATA" "${DATA_SPLIT:-}" "${DATA_FLAGS:-}"
    if [[ -n "${VALID_DATA:-}" ]]; then
        preprocess valid "$VALID_DATA" "${VALID_SPLIT:-}" "${VALID_FLAGS:-}"
        valid=$'\npreprocess valid'
        HELD_OUT=(--valid-data-path "$WORK_DIR/data/valid")
    fi
    if ((${#LORA_ARGS[@]})) && [[ -z "${SFT_DATA:-}" ]]; then
        START=$HF_MODEL SOURCES="preprocess train$valid"
        return
    fi
    MADE_FROM=("--input=model=$HF_MODEL")
    stage "convert the model" "$START/latest_checkpointed_iteration.txt" "$START" \
        python "$ROOT/tools/convert_hf_to_megatron.py" --hf-model "$HF_MODEL" --save "$START"
    if [[ -n "${SFT_DATA:-}" ]]; then
        preprocess sft "$SFT_DATA" "${SFT_SPLIT:-}" "${SFT_FLAGS:-}"
        fine_tune "$sources"$'\n'"preprocess sft$valid"
        START="$WORK_DIR/sft" sources="train sft"
        if ((${#LORA_ARGS[@]})); then START="$WORK_DIR/sft-hf"; fi
    fi
    SOURCES="$sources"$'\n'"preprocess train$valid"
}

# fine_tune UPSTREAM: train all weights on the supervised data.
fine_tune() {
    local LORA_ARGS=()
    train_stage sft "$START" "$WORK_DIR/sft-hf" "$1" "${SFT_ARGS[@]}" --data-path "$WORK_DIR/data/sft" "${HELD_OUT[@]}"
}

# merge_stage ADAPTER MODEL UPSTREAM: merge an adapter into the model that it is of.
merge_stage() {
    local MADE_FROM=("--input=adapter=$1" "--input=model=$START")
    made_from_stages "$3"
    stage "merge the adapter" "$2/config.json" "$2" \
        python "$ROOT/tools/merge_adapter.py" --load-adapter "$1" --base-hf "$START" --save-hf "$2"
}

# run_stages FLAGS...: everything; the flags go to the preference training. An adapter's results stand beside those of the whole model.
run_stages() {
    prepare_start
    local name=rmipo result="$WORK_DIR/hf" report="$WORK_DIR/report.html"
    if ((${#LORA_ARGS[@]})); then name=rmipo-lora result="$WORK_DIR/adapter" report="$WORK_DIR/report-lora.html"; fi
    train_stage "$name" "$START" "$result" "$SOURCES" "${RMIPO_ARGS[@]}" "${DATA_ARGS[@]}" "${HELD_OUT[@]}" "$@"
    local published=$result
    if [[ -n "${MERGE:-}" ]]; then
        merge_stage "$result" "$WORK_DIR/merged-hf" "train $name"
        result="$WORK_DIR/merged-hf"
    fi
    if ((NODE_RANK == 0)); then
        CURRENT_STAGE="result"
        say "result"
        local rows=()
        if [[ -n "${EMBEDDED:-}" ]]; then rows=(--rows "$VALID_DATA"); fi
        run python "$ROOT/tools/summarize_run.py" --log-dir "$WORK_DIR/$name/logs" --model "$result" "${rows[@]}"
        if [[ -n "${PUSH_TO_HUB:-}" ]]; then
            local yes=()
            if [[ -n "${PUSH_YES:-}" ]]; then yes=(--yes); fi
            run python "$ROOT/tools/push_to_hub.py" "$published" "$PUSH_TO_HUB" "${yes[@]}"
        fi
        # Last, so that the last line says where it is.
        run python "$ROOT/tools/report.py" "$WORK_DIR/$name" --output "$report"
    fi
}

# Nothing is downloaded at run time, least of all by every node.
die_without_model() {
    local directory=${!1}
    if [[ ! -e "$directory" && "$directory" =~ ^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+$ ]]; then
        die "$1=$directory is no directory here, and nothing is downloaded. If it is the name of a model on the Hugging Face hub:
  hf download $directory --local-dir models/${directory#*/}
and start again with models/${directory#*/} as $1"
    fi
    die "$1=$directory: no config.json there; name the directory of a Hugging Face model"
}

# check_numbers NAME...: stop where one of these variables is set to something else than a whole number.
check_numbers() {
    local name
    for name in "$@"; do
        if [[ -n "${!name:-}" && ! "${!name}" =~ ^(0|[1-9][0-9]*)$ ]]; then die "$name=${!name}: a whole number is needed"; fi
    done
}

# check_nodes: stop where several nodes do not know their first one or their own number; each would train alone or wait for ever.
check_nodes() {
    if ((GPUS_PER_NODE < 1 || NUM_NODES < 1)); then
        die "GPUS_PER_NODE=$GPUS_PER_NODE NUM_NODES=$NUM_NODES: at least 1 of each is needed"
    fi
    if ((NODE_RANK >= NUM_NODES)); then
        die "NODE_RANK=$NODE_RANK: with NUM_NODES=$NUM_NODES the nodes are numbered from 0 to $((NUM_NODES - 1))"
    fi
    if ((NUM_NODES > 1)) && [[ -z "$1" || -z "${MASTER_ADDR:-}" ]]; then
        die "NUM_NODES=$NUM_NODES: each node needs NODE_RANK (0 to $((NUM_NODES - 1))) and MASTER_ADDR (host name or address of node 0)"
    fi
}

# Where to run: the GPUs of each node, or two processes over gloo on the CPU.
set_layout() {
    local gpus given_rank=${NODE_RANK:-}
    check_numbers GPUS_PER_NODE NUM_NODES NODE_RANK MASTER_PORT MAX_RESTARTS TP PP EP WORKERS OMP_NUM_THREADS SEQ_LENGTH \
        TOKENS_PER_MICROBATCH GLOBAL_BATCH_SIZE LOG_INTERVAL EVAL_INTERVAL EVAL_PAIRS SAVE_INTERVAL STEPS STAGE_TIMEOUT_MINUTES FAILURE_GRACE_SECONDS \
        LORA_RANK LORA_ALPHA
    gpus=$(count_gpus)
    GPUS_PER_NODE=${GPUS_PER_NODE:-$((gpus > 0 ? gpus : 2))}
    NUM_NODES=${NUM_NODES:-1}
    NODE_RANK=${NODE_RANK:-0}
    check_nodes "$given_rank"
    MASTER_ADDR=${MASTER_ADDR:-localhost}
    # Runs beside each other on one machine must not meet on one port; several nodes must agree on one.
    MASTER_PORT=${MASTER_PORT:-$((NUM_NODES > 1 ? 6000 : 20000 + $$ % 20000))}
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
        --max-restarts "${MAX_RESTARTS:-0}"
    )
    # A torchrun beside it means that python has torch.
    if ! command -v torchrun >/dev/null && [[ -x "$ROOT/.venv/bin/torchrun" ]]; then
        PATH="$ROOT/.venv/bin:$PATH"
    fi
    if is_dry; then return; fi
    if ! command -v python >/dev/null; then
        die "python is not on the PATH: run 'make venv', or activate the environment this project is installed in"
    fi
    # Says what is missing, or lies where nothing can read it.
    local name given=()
    for name in HF_MODEL DATA VALID_DATA SFT_DATA CHAT_TEMPLATE WORK_DIR; do given+=("$name=${!name:-}"); done
    python -m megatron_rmipo.entry "${given[@]}" || exit
}
