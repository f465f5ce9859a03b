# shellcheck shell=bash
# How the stages run: commands that hear the script's signals, records of what made each result, and nodes that wait for the first.

# "Try again later" of sysexits.h: a start that ended early and goes on when it is started again. The trainer's, too.
EX_TEMPFAIL=75

CURRENT_STAGE="the start"
# Where the running training saves.
SAVED_IN=""
# Process of the running command ("starting" until it is known), and how many signals have come.
CHILD=""
HEARD=0

die() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

say() {
    echo "== $*"
}

# Whether commands are printed and nothing is run or written.
is_dry() {
    [[ -n "${DRY_RUN:-}" ]]
}

# handle_signals: hand signals on to the command that runs; on the first node, leave a note for the others when the script fails.
handle_signals() {
    if is_dry; then return; fi
    trap 'on_signal TERM' TERM
    trap 'on_signal INT' INT
    # The trainer saves at TERM and knows nothing of HUP.
    trap 'on_signal TERM' HUP
    if ((NODE_RANK == 0)); then
        mkdir -p "$WORK_DIR/.stages"
        rm -f "$WORK_DIR/.stages/ended"
        trap 'leave_note $?' EXIT
    fi
}

on_signal() {
    HEARD=$((HEARD + 1))
    if [[ -z "$CHILD" ]]; then stop_here "stopped by a signal"; fi
    if [[ "$CHILD" != starting ]]; then hand_on "$1"; fi
}

# The command's process group, so that its helpers hear it too; ranks are in groups of their own and hear the launcher. Once: a tool
# may be cleaning up.
hand_on() {
    if ((HEARD == 1)); then kill -s "$1" -- "-$CHILD" 2>/dev/null || true; fi
}

leave_note() {
    # Those that wait take a stop for what it is.
    if (($1 != 0)); then echo "$CURRENT_STAGE: exit status $1" >"$WORK_DIR/.stages/ended"; fi
}

# stop_here WHY: end this start; the next one goes on.
stop_here() {
    local saved="" latest="$SAVED_IN/latest_checkpointed_iteration.txt"
    if [[ -n "$SAVED_IN" && -e "$latest" ]]; then saved="; step $(<"$latest") is saved in $SAVED_IN"; fi
    say "$CURRENT_STAGE: $1$saved; start this script again to go on"
    exit "$EX_TEMPFAIL"
}

# run COMMAND...: run it and return its status, or print it where DRY_RUN is set. In the foreground bash would not hear a signal before
# the command ends; without job control (set -m) the command would ignore SIGINT.
run() {
    if is_dry; then
        printf '%q ' "$@"
        echo
        return
    fi
    local status heard
    CHILD=starting
    set -m
    "$@" </dev/null &
    CHILD=$!
    set +m
    if ((HEARD > 0)); then hand_on TERM; fi
    while true; do
        heard=$HEARD status=0
        wait "$CHILD" || status=$?
        # A signal ends the wait, not the command.
        if ((HEARD == heard)); then break; fi
    done
    CHILD=""
    # Exit codes of a command that a signal ended; others are faults.
    if ((HEARD > 0)); then
        case $status in
            0 | "$EX_TEMPFAIL" | 129 | 130 | 143) stop_here "stopped by a signal" ;;
        esac
    fi
    return "$status"
}

# record_path NAME: where it is noted what a stage's result was made from.
record_path() {
    echo "$WORK_DIR/.stages/${1//[ \/]/-}.json"
}

# made_from_stages NAME...: note in MADE_FROM that a stage starts from the results of others.
made_from_stages() {
    local name
    for name in "$@"; do MADE_FROM+=("--upstream=$name=$(record_path "$name")"); done
}

# check_record NAME MADE REMEDY FLAGS...: where the stage has MADE something (else ""), stop unless it was made from what the flags of
# megatron_rmipo.stage_record say; else note them.
check_record() {
    local flags=("--name=$1" "--made=$2" "--remedy=$3")
    if ((NODE_RANK > 0)); then
        if [[ -z "$2" ]]; then return; fi
        flags+=(--read-only)
    fi
    python -m megatron_rmipo.stage_record "$(record_path "$1")" "${flags[@]}" "${@:4}" || exit
}

# wait_for NAME RESULT: wait until the first node has written RESULT.
wait_for() {
    local start=$SECONDS failed_since="" minutes=${STAGE_TIMEOUT_MINUTES:-240} note="$WORK_DIR/.stages/ended"
    say "$1: waiting for the first node to write $2"
    until [[ -e "$2" ]]; do
        if [[ ! -e "$note" ]]; then
            failed_since=""
        elif ((SECONDS - ${failed_since:=$SECONDS} >= ${FAILURE_GRACE_SECONDS:-60})); then
            if [[ "$(<"$note")" == *"status $EX_TEMPFAIL" ]]; then stop_here "the first node has stopped"; fi
            die "$1: the first node has failed ($(<"$note")); its own output says why"
        fi
        if ((SECONDS - start >= minutes * 60)); then
            die "$1: the first node has not written $2 within $minutes minutes; see its output, or raise STAGE_TIMEOUT_MINUTES"
        fi
        sleep 1
    done
}
