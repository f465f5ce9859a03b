#!/usr/bin/env bash
# The ablations of the RMiPO paper (its tables 3, 5, 7 and 8) by flags alone, each against the same model and data.
#
#   bash examples/ablations.sh [flags of the trainer, for every row]
#   HF_MODEL=/models/Meta-Llama-3-8B-Instruct DATA=ultrafeedback.jsonl bash examples/ablations.sh
#
# With neither HF_MODEL nor DATA it runs on the small embedded example: 17 trainings, each about a minute on one CPU core, and two
# or three minutes before them for what all start from. Variables: examples/grid.sh (ONLY, ROWS, SEEDS, STEPS ...) and examples/stages.sh, and
# PRESET, of the rmipo rows (per_token). A row of ROWS is rmipo with the flags of its line, where they do not say --objective.
# Printed at the end, and written to WORK_DIR/ablations.md and .csv: a line a run, with accuracy, margin and loss on the held-out pairs
# before and after, and how the target margin gamma is spread over them; WORK_DIR/ablations.png draws them (needs matplotlib). docs/comparison.md explains
# the tables.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=examples/grid.sh
source "$ROOT/examples/grid.sh"
choose_grid ablations

# Row name -> the flags in which it differs from RMiPO's defaults (beta 2, gamma 0.3 to 1.6, exponential, mutual information per token).
# With PRESET=paper it is that of whole responses: most margins are at a bound, and the schedules are one (docs/objectives/rmipo.md).
declare -A FLAGS=(
    [rmipo]=""
    # Table 3. GM: tuned bounds, else [0, 1]. MI: the margin follows mutual information, else the plain gap in mean log-probability. ED:
    # exponential decay, else linear.
    [none]="--gamma-min 0 --gamma-max 1 --margin-signal gap --margin-schedule linear"
    # GM alone leaves nothing for the margin to follow: a constant. The paper does not name it; this is its upper bound, what rmipo gives
    # a pair that the prompt does not tell apart. Table 7's "w/o" is the same run.
    [gm]="--gamma-max 1.6 --margin-schedule none"
    [mi]="--gamma-min 0 --gamma-max 1 --margin-schedule linear"
    [ed]="--gamma-min 0 --gamma-max 1 --margin-signal gap"
    [gm-mi]="--margin-schedule linear"
    [gm-ed]="--margin-signal gap"
    [mi-ed]="--gamma-min 0 --gamma-max 1"
    # Table 5, without length normalization; dpo compares sums as it is. Hyperparameters as in compare_objectives.sh.
    [rmipo-sums]="--no-length-normalization"
    [simpo-sums]="--no-length-normalization"
    [simper-sums]="--no-length-normalization"
    [alpha_dpo-sums]="--no-length-normalization --gamma-beta-ratio 0.2"
    [dpo]=""
    # Table 7; linear is gm-mi, none is gm.
    [cosine]="--margin-schedule cosine"
    # Table 8.
    [bounds-0-2]="--gamma-min 0 --gamma-max 2"
    [bounds-0.5-1.4]="--gamma-min 0.5 --gamma-max 1.4"
    [bounds-1.0-1.2]="--gamma-min 1.0 --gamma-max 1.2"
)
# In the order they are trained.
GRID_ROWS=(
    rmipo none gm mi ed gm-mi gm-ed mi-ed cosine bounds-0-2 bounds-0.5-1.4 bounds-1.0-1.2
    rmipo-sums simpo-sums simper-sums dpo alpha_dpo-sums
)
# Rows of objectives other than rmipo.
declare -A OBJECTIVE=([simpo-sums]=simpo [simper-sums]=simper [dpo]=dpo [alpha_dpo-sums]=alpha_dpo)
# The objectives that need the model as it was before; a row that goes on from its own checkpoint has no other way to find it. Adapters
# stand on it.
WITH_REFERENCE=" dpo alpha_dpo "

add_own_rows
check_only "${GRID_ROWS[@]}"
prepare_start
for row in "${GRID_ROWS[@]}"; do
    flags_of "$row" "${OBJECTIVE[$row]:-rmipo}"
    if [[ "$objective" == rmipo && -n "${PRESET:-}" ]]; then flags+=(--preset "$PRESET"); fi
    if [[ -z "${LORA_RANK:-}" && "$WITH_REFERENCE" == *" $objective "* ]]; then flags+=(--reference-load "$START"); fi
    train_row "$row" --lr "$LR" "${flags[@]}" "$@"
done

own=()
if ((${#OWN_ROWS[@]})); then own=(--table "Rows of your own, beside rmipo" rmipo "${OWN_ROWS[@]}"); fi
# A run that stands in several tables was trained once. Label=run.
show_tables --view margins \
    --table "Table 3: components (GM tuned bounds, MI mutual information, ED exponential decay)" \
    "none=none" "GM=gm" "MI=mi" "ED=ed" "GM + MI=gm-mi" "GM + ED=gm-ed" "MI + ED=mi-ed" "GM + MI + ED=rmipo" \
    --table "Table 5: without length normalization" \
    "dpo=dpo" "simpo=simpo-sums" "alpha_dpo=alpha_dpo-sums" "simper=simper-sums" "rmipo=rmipo-sums" \
    --table "Table 7: schedules" "exponential=rmipo" "linear=gm-mi" "cosine=cosine" "none=gm" \
    --table "Table 8: bounds" \
    "[0, 2]=bounds-0-2" "[0.3, 1.6]=rmipo" "[0.5, 1.4]=bounds-0.5-1.4" "[1.0, 1.2]=bounds-1.0-1.2" \
    "${own[@]}"
