#!/usr/bin/env bash
# Did it work? A trained model and the one it was made from, side by side: lm-eval's tasks, preference pairs without a judge, and answers
# to benchmarks, for a judge.
#
#   bash examples/evaluate.sh MODEL BASE
#   ONLY="lm_eval generate" BENCHMARKS="mt_bench=question.jsonl" bash examples/evaluate.sh work/llama3-8b/hf /models/Llama-3-8B-Instruct
#
# MODEL and BASE are Hugging Face model directories. Printed at the end, and written to WORK_DIR/side_by_side.md and .json: every number of
# one beside that of the other. Variables:
#
#   ONLY            stages to run, of: lm_eval pairs generate (all that have something to do)
#   TASKS           of lm-eval, separated by commas (leaderboard: those of the Open LLM Leaderboard v2)
#   INCLUDE_PATH    folder with tasks of one's own        LIMIT   questions of each task and benchmark, for a first try
#   PAIRS           preference sets, NAME=PATH ...        BENCHMARKS   prompts, BENCHMARK=FILE ... (tools/generate_answers.py)
#   MODEL_NAME, BASE_NAME   how tables and judges call them (model, base)
#   LM_EVAL_FLAGS, PAIRS_FLAGS, GENERATE_FLAGS   further flags of each, such as GENERATE_FLAGS="--preset llama3"
#   LM_EVAL_MODEL   hf, or vllm where it is installed (hf)   LM_EVAL_MODEL_ARGS   its further arguments, as tensor_parallel_size=4
#   DTYPE           bfloat16 with a GPU, else float32 (lm_eval alone)   APPLY_CHAT_TEMPLATE=0   lm_eval without chat templates, for a
#                   BASE that has none
#   WORK_DIR        where results go (work/evaluation)    DRY_RUN=1   print the commands instead of running them
#
# A stage whose result is there is skipped, and refused where it was made from something else. Without a network, HF_HUB_OFFLINE=1 and
# tasks whose data are files.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=examples/stages.sh
source "$ROOT/examples/stages.sh"

if (($# != 2)); then die "MODEL BASE: give two Hugging Face model directories, the trained one and the one it was made from"; fi
WORK_DIR=${WORK_DIR:-work/evaluation}
# One process, on one node.
NODE_RANK=0
STAGES=(lm_eval pairs generate)
for name in ${ONLY:-}; do
    if [[ " ${STAGES[*]} " != *" $name "* ]]; then die "ONLY: there is no stage $name; there are: ${STAGES[*]}"; fi
done
NAMES=("${MODEL_NAME:-model}" "${BASE_NAME:-base}")
if [[ "${NAMES[0]}" == "${NAMES[1]}" ]]; then die "MODEL_NAME and BASE_NAME are both ${NAMES[0]}: give each its own"; fi
MODEL=$1 BASE=$2
DIRECTORIES=("$MODEL" "$BASE")
if ! is_dry; then
    for name in MODEL BASE; do
        if [[ ! -e "${!name}/config.json" ]]; then die_without_model "$name"; fi
    done
fi
DTYPE=${DTYPE:-$( (($(count_gpus) > 0)) && echo bfloat16 || echo float32)}
handle_signals

is_wanted() {
    [[ -z "${ONLY:-}" || " $ONLY " == *" $1 "* ]]
}

# evaluated NAME FILE: note a result for the table at the end.
evaluated() {
    if [[ "$1" == "${NAMES[0]}" ]]; then OF_MODEL+=("$2"); else OF_BASE+=("$2"); fi
}

# flags_of VARIABLE: the words of a variable, into the array FLAGS, and as a setting of the stage.
flags_of() {
    read -ra FLAGS <<<"${!1:-}"
    MADE_FROM+=("--setting=$1=${FLAGS[*]}")
}

# lm_eval_stage NAME DIRECTORY
lm_eval_stage() {
    local raw="$WORK_DIR/lm_eval/$1" result="$WORK_DIR/$1/lm_eval" FLAGS=() MADE_FROM=("--input=model=$2")
    local tasks=${TASKS:-leaderboard} model_args="pretrained=$2,dtype=$DTYPE${LM_EVAL_MODEL_ARGS:+,$LM_EVAL_MODEL_ARGS}" batch_size=8
    MADE_FROM+=("--setting=tasks $tasks, limit ${LIMIT:-none}, ${LM_EVAL_MODEL:-hf} $model_args, template ${APPLY_CHAT_TEMPLATE:-1}")
    flags_of LM_EVAL_FLAGS
    if [[ "${APPLY_CHAT_TEMPLATE:-1}" == 1 ]]; then FLAGS+=(--apply_chat_template); fi
    if [[ "$DTYPE" != float32 ]]; then batch_size=auto; fi
    if [[ -n "${INCLUDE_PATH:-}" ]]; then
        FLAGS+=(--include_path "$INCLUDE_PATH")
        MADE_FROM+=("--input=tasks of one's own=$INCLUDE_PATH")
    fi
    if [[ -n "${LIMIT:-}" ]]; then FLAGS+=(--limit "$LIMIT"); fi
    stage "lm_eval $1" "$result.json" "$result.* $raw" lm_eval run --model "${LM_EVAL_MODEL:-hf}" --model_args "$model_args" \
        --tasks "$tasks" --batch_size "$batch_size" --output_path "$raw" "${FLAGS[@]}"
    if is_dry || [[ ! -e "$result.json" ]]; then
        run python "$ROOT/tools/compare_evaluations.py" --model "$raw" --output "$result"
    fi
    evaluated "$1" "$result.json"
}

# pairs_stage NAME DIRECTORY FLAGS...
pairs_stage() {
    local name=$1 directory=$2 result="$WORK_DIR/$1/evaluate_pairs.json" FLAGS=() MADE_FROM=("--input=model=$2") sets=() one
    shift 2
    for one in $PAIRS; do
        sets+=("$one")
        MADE_FROM+=("--input=$one=${one#*=}")
    done
    # What it is compared with.
    if (($# > 0)); then made_from_stages "pairs ${NAMES[1]}"; fi
    flags_of PAIRS_FLAGS
    stage "pairs $name" "$result" "$WORK_DIR/$name/*pairs*" python "$ROOT/tools/evaluate_pairs.py" --load-hf "$directory" \
        --data "${sets[@]}" --output "$result" --pairs "$WORK_DIR/$name/pairs.jsonl" "$@" "${FLAGS[@]}"
    evaluated "$name" "$result"
}

# generate_stage NAME DIRECTORY BENCHMARK FILE
generate_stage() {
    local answers="$WORK_DIR/answers/$3" FLAGS=() MADE_FROM=("--input=model=$2" "--input=prompts=$4" "--setting=limit ${LIMIT:-none}")
    flags_of GENERATE_FLAGS
    if [[ -n "${LIMIT:-}" ]]; then FLAGS+=(--limit "$LIMIT"); fi
    stage "generate $3 $1" "$answers/$1.evaluation.json" "$answers/$1.*" python "$ROOT/tools/generate_answers.py" --model "$1=$2" \
        --benchmark "$3" --prompts "$4" --output "$answers" "${FLAGS[@]}"
    evaluated "$1" "$answers/$1.evaluation.json"
}

OF_MODEL=() OF_BASE=()
if is_wanted lm_eval; then
    if ! is_dry && ! command -v lm_eval >/dev/null; then
        die "lm_eval is not on the PATH: pip install -e '.[evaluate]' in the environment of this project, or leave it out with ONLY"
    fi
    for place in 0 1; do lm_eval_stage "${NAMES[place]}" "${DIRECTORIES[place]}"; done
fi
if is_wanted pairs && [[ -n "${PAIRS:-}" ]]; then
    # The base first: the model's pairs are compared with its.
    pairs_stage "${NAMES[1]}" "${DIRECTORIES[1]}"
    pairs_stage "${NAMES[0]}" "${DIRECTORIES[0]}" --compare "$WORK_DIR/${NAMES[1]}/pairs.jsonl"
fi
if is_wanted generate; then
    for benchmark in ${BENCHMARKS:-}; do
        for place in 0 1; do
            generate_stage "${NAMES[place]}" "${DIRECTORIES[place]}" "${benchmark%%=*}" "${benchmark#*=}"
        done
    done
fi
if ((${#OF_MODEL[@]} == 0)); then die "nothing to evaluate: set PAIRS or BENCHMARKS, or name lm_eval in ONLY"; fi
CURRENT_STAGE="side by side"
say "side by side"
run python "$ROOT/tools/compare_evaluations.py" --model "${OF_MODEL[@]}" --base "${OF_BASE[@]}" --output "$WORK_DIR/side_by_side"
for benchmark in ${BENCHMARKS:-}; do
    if is_wanted generate; then
        run python "$ROOT/tools/generate_answers.py" --model "${NAMES[0]}=$1" "${NAMES[1]}=$2" --benchmark "${benchmark%%=*}" \
            --prompts "${benchmark#*=}" --output "$WORK_DIR/answers/${benchmark%%=*}" --print-judge-commands
    fi
done
