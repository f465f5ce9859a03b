# shellcheck shell=bash
# Several preference trainings from one start, as ablations.sh and compare_objectives.sh do. Besides the variables of examples/stages.sh:
#
#   ONLY="name name"   train these rows alone; the tables also show what was trained before
#   STEPS or EPOCHS    length of every row (one epoch; the embedded example: 64 steps of 32 pairs)
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
    GRID=$1
    # The tables show the first and the last evaluation.
    EVAL_INTERVAL=${EVAL_INTERVAL:-0}
    choose_inputs "$1" 6e-7
    TP=${TP:-$(share_over 4)}
    set_arguments
    LOGGING_ARGS+=(--keep-last 1)
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

# train_row NAME FLAGS...: train one row, unless ONLY leaves it out; a failure is noted and told at the end.
train_row() {
    local name=$1 row="$GRID/$1" model="$WORK_DIR/$GRID-models/$1"
    shift
    if ! is_chosen "$name"; then return; fi
    train_stage "$row" "$START" "$model" "$SOURCES" --data-path "$WORK_DIR/data/train" "${HELD_OUT[@]}" "${LENGTH_ARGS[@]}" "$@" ||
        FAILED_ROWS+=("$name")
    if [[ -n "${REMOVE_CHECKPOINTS:-}" && -e "$model/config.json" ]] && ((NODE_RANK == 0)) && ! is_dry; then
        rm -rf "$WORK_DIR/$row"/iter_* "$WORK_DIR/$row/latest_checkpointed_iteration.txt"
    fi
}

# show_tables FLAGS...: the tables of the runs, printed and in $WORK_DIR/NAME.md and .csv, on the first node.
show_tables() {
    if ((NODE_RANK == 0)); then
        CURRENT_STAGE="tables"
        say "tables"
        run python "$ROOT/tools/compare_runs.py" --runs "$WORK_DIR/$GRID" --output "$WORK_DIR/$GRID" "$@"
    fi
    if ((${#FAILED_ROWS[@]} > 0)); then
        CURRENT_STAGE="the end"
        die "these rows failed (their output is above), start again to retry them: ${FAILED_ROWS[*]}"
    fi
}
