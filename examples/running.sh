# shellcheck shell=bash
# How the stages run: commands that hear the script's signals, records of what made each result, and nodes that wait for the first.

# "Try again later" of sysexits.h: a start that ended early and goes on when it is started again.
EX_TEMPFAIL=75

CURRENT_STAGE="the start"
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
    trap 'on_signal TERM 143' TERM
    trap 'on_signal INT 130' INT
    # The trainer saves at TERM and knows nothing of HUP.
    trap 'on_signal TERM 129' HUP
    if ((NODE_RANK == 0)); then
        mkdir -p "$WORK_DIR/.stages"
        rm -f "$WORK_DIR/.stages/failed"
        trap 'leave_note $?' EXIT
    fi
}

on_signal() {
    HEARD=$((HEARD + 1))
    if [[ -z "$CHILD" ]]; then exit "$2"; fi
    if [[ "$CHILD" != starting ]]; then hand_on "$1"; fi
}

# The command's process group, so that its helpers hear it too; torchrun's ranks are in groups of their own and hear torchrun.
hand_on() {
    # A second signal makes torchrun leave its ranks behind.
    if [[ -z "${SIGNALS_REACH_ALL:-}" ]] && ((HEARD == 1)); then kill -s "$1" -- "-$CHILD" 2>/dev/null || true; fi
}

leave_note() {
    if (($1 != 0)); then echo "$CURRENT_STAGE: exit status $1" >"$WORK_DIR/.stages/failed"; fi
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
    if ((HEARD > 0)); then
        say "$CURRENT_STAGE: stopped by a signal; start this script again to go on"
        exit $((status > 0 ? status : EX_TEMPFAIL))
    fi
    return "$status"
}

# record_path NAME: where the command that made a stage's result is kept.
record_path() {
    echo "$WORK_DIR/.stages/${1//[ \/]/-}"
}

# records_of NAME...: what made the results that another stage starts from, a line each.
records_of() {
    local name
    for name in "$@"; do
        if [[ -e "$(record_path "$name")" ]]; then sed "s/^/from $name: /" "$(record_path "$name")"; fi
    done
}

# check_record NAME MADE REMEDY TEXT: where the stage has MADE something (else ""), stop unless TEXT is what made it; else note TEXT.
check_record() {
    local record before now
    record=$(record_path "$1")
    if [[ -z "$2" ]]; then
        # One writer, and never half a record: the nodes share the directory.
        if ((NODE_RANK == 0)); then
            echo "$4" >"$record.new"
            mv "$record.new" "$record"
        fi
    elif [[ -e "$record" && "$(<"$record")" != "$4" ]]; then
        before=$(grep -vxF -e "$4" "$record" | sed 's/^/  then: /' || true)
        now=$(grep -vxF -f "$record" <<<"$4" | sed 's/^/  now:  /' || true)
        die "$1: $2 was made with other settings:
$before
$now
Set WORK_DIR to another directory, or make it again: $3"
    fi
}

# wait_for NAME RESULT: wait until the first node has written RESULT.
wait_for() {
    local start=$SECONDS failed_since="" minutes=${STAGE_TIMEOUT_MINUTES:-240} note="$WORK_DIR/.stages/failed"
    say "$1: waiting for the first node to write $2"
    until [[ -e "$2" ]]; do
        if [[ ! -e "$note" ]]; then
            failed_since=""
        elif ((SECONDS - ${failed_since:=$SECONDS} >= ${FAILURE_GRACE_SECONDS:-60})); then
            die "$1: the first node has failed ($(<"$note")); its own output says why"
        fi
        if ((SECONDS - start >= minutes * 60)); then
            die "$1: the first node has not written $2 within $minutes minutes; see its output, or raise STAGE_TIMEOUT_MINUTES"
        fi
        sleep 1
    done
}
