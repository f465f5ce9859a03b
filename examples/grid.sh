# shellcheck shell=bash
# Several preference trainings from one start, as ablations.sh and compare_objectives.sh do. Besides the variables of examples/stages.sh:
#
#   ONLY="name name"   train these rows alone; the tables also show what was trained before. An objective of one's own, module:Class, is a
#                      row by that name
#   ROWS=FILE          rows of one's own besides: a line a row, its name and the flags that it adds, split at spaces. "#" begins a
#                      comment; START stands for the checkpoint that all rows start from, as in --reference-load START
#   SEEDS=3            train each row with so many seeds (of the order of the pairs), --seed and those after it; the tables show means
#                      with standard errors over them. Further seeds are trained into NAME.seed-N
#   STEPS or EPOCHS    length of every row (one epoch; the embedded example: 64 steps of 32 pairs)
#   LORA_RANK          train adapters; what is written is called NAME-lora then, and START is a Hugging Face model (--reference-hf START)
#   LR                 learning rate of every row         REMOVE_CHECKPOINTS=1   drop a row's checkpoints once it is complete, which at
#                      8B are a hundred gigabytes a row; its logs and its Hugging Face model stay
#
# Rows are trained one after the other. One that is complete is skipped, one that was interrupted goes on, one that was made with other
# settings is refused; one that fails does not keep the others from being trained. The data, the converted model and the fine-tuned one are
# made once, in WORK_DIR; the scripts of the embedded example share one.

# shellcheck source=examples/stages.sh
source "$ROOT/examples/stages.sh"
# shellcheck source=examples/settings.sh
source "$ROOT/examples/settings.sh"

FAILED_ROWS=()

# choose_grid NAME: the inputs and settings of a grid whose runs go to $WORK_DIR/NAME; with a real model, WORK_DIR is work/NAME.
choose_grid() {
    GRID=$1${LORA_RANK:+-lora}
    check_numbers SEEDS
    if ((${SEEDS:-1} < 1)); then die "SEEDS=$SEEDS: at least 1 is needed"; fi
    # The tables show the first and the last evaluation.
    EVAL_INTERVAL=${EVAL_INTERVAL:-0}
    choose_inputs "$1" 6e-7
    TP=${TP:-$(share_over 4)}
    set_arguments
    LOGGING_ARGS+=(--keep-last 1)
}

# add_own_rows: add the rows of the file ROWS to GRID_ROWS and OWN_ROWS, and the objectives that ONLY names as module:Class; with their flags
# in FLAGS.
OWN_ROWS=()
add_own_rows() {
    local line name flags number=0
    if [[ -n "${ROWS:-}" ]]; then
        if [[ -d "$ROWS" || ! -r "$ROWS" ]]; then die "ROWS=$ROWS: no such file; it has a line a row, its name and its flags"; fi
        while read -r line || [[ -n "$line" ]]; do
            number=$((number + 1))
            read -r name flags <<<"${line%%#*}"
            if [[ -n "$name" ]]; then add_own_row "ROWS=$ROWS, line $number" "$name" "$flags"; fi
        done <"$ROWS"
    fi
    for name in ${ONLY:-}; do
        if [[ "$name" == *:* && " ${GRID_ROWS[*]} " != *" $name "* ]]; then add_own_row ONLY "$name" "--objective $name"; fi
    done
}

# add_own_row PLACE NAME FLAGS: PLACE is where the row was given.
add_own_row() {
    if [[ ! "$2" =~ ^[A-Za-z0-9][A-Za-z0-9._:-]*$ || "$2" == *.seed-* ]]; then
        die "$1: $2 cannot be the name of a row, which is letters, digits and . _ - : alone, without .seed-"
    fi
    if [[ " ${GRID_ROWS[*]} " == *" $2 "* ]]; then die "$1: there is a row $2 already; give this one another name"; fi
    if [[ -n "$3" && "$3" != --* ]]; then die "$1: $2 is followed by $3; a line is a name and flags, as in: $2 --beta 0.5"; fi
    GRID_ROWS+=("$2") OWN_ROWS+=("$2") FLAGS[$2]=$3
}

# flags_of ROW OBJECTIVE: set the array flags to the flags of a row, and objective to the one that they say, else to OBJECTIVE.
flags_of() {
    local number
    objective=""
    read -ra flags <<<"${FLAGS[$1]:-}"
    for number in "${!flags[@]}"; do
        case ${flags[number]} in
            START) flags[number]=$START ;;
            --objective) objective=${flags[number + 1]:-} ;;
            --objective=*) objective=${flags[number]#*=} ;;
        esac
    done
    if [[ -z "$objective" ]]; then
        objective=$2
        flags=(--objective "$objective" "${flags[@]}")
    fi
}

# check_only NAME...: stop where ONLY names something else.
check_only() {
    local name
    for name in ${ONLY:-}; do
        if [[ " $* " != *" $name "* ]]; then die "ONLY: there is no row $name; there are: $*"; fi
    done
}

# is_chosen NAME: whether the row is to be trained.
is_chosen() {
    [[ -z "${ONLY:-}" || " $ONLY " == *" $1 "* ]]
}

# train_row NAME FLAGS...: train one row with each seed, unless ONLY leaves it out; a failure is noted and told at the end.
train_row() {
    local name=$1 number first
    shift
    if ! is_chosen "$name"; then return; fi
    first=$(last_seed "${TRAINING_ARGS[@]}" "$@")
    train_seed "$name" "$@"
    for ((number = 1; number < ${SEEDS:-1}; number++)); do
        train_seed "$name.seed-$((first + number))" "$@" --seed $((first + number))
    done
}

# last_seed FLAGS...: the seed that they give.
last_seed() {
    local seed=""
    while (($#)); do
        case $1 in
            --seed) seed=${2:-} ;;
            --seed=*) seed=${1#*=} ;;
        esac
        shift
    done
    if [[ ! "$seed" =~ ^[0-9]+$ ]]; then die "--seed $seed: a whole number is needed"; fi
    echo "$seed"
}

# train_seed NAME FLAGS...: one training of a row.
train_seed() {
    local row="$GRID/$1" model="$WORK_DIR/$GRID-models/$1"
    train_stage "$row" "$START" "$model" "$SOURCES" --data-path "$WORK_DIR/data/train" "${HELD_OUT[@]}" "${LENGTH_ARGS[@]}" "${@:2}" ||
        FAILED_ROWS+=("$1")
    if [[ -n "${REMOVE_CHECKPOINTS:-}" && (-e "$model/config.json" || -e "$model/adapter_config.json") ]] &&
        ((NODE_RANK == 0)) && ! is_dry; then
        rm -rf "$WORK_DIR/$row"/iter_* "$WORK_DIR/$row/latest_checkpointed_iteration.txt"
    fi
}

# show_tables FLAGS...: the tables of the runs, printed and in $WORK_DIR/NAME.md and .csv, and their picture in .png, on the first node.
show_tables() {
    if ((NODE_RANK == 0)); then
        CURRENT_STAGE="tables"
        say "tables"
        run python "$ROOT/tools/compare_runs.py" --runs "$WORK_DIR/$GRID" --output "$WORK_DIR/$GRID" \
            --picture "$WORK_DIR/$GRID.png" "$@"
    fi
    if ((${#FAILED_ROWS[@]} > 0)); then
        CURRENT_STAGE="the end"
        die "these rows failed (their output is above), start again to retry them: ${FAILED_ROWS[*]}"
    fi
}
