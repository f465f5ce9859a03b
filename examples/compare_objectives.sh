#!/usr/bin/env bash
# Every objective on the same model, the same pairs and as many steps, with the paper's hyperparameters.
#
#   bash examples/compare_objectives.sh [flags of the trainer, for every objective]
#   ONLY="rmipo dpo" LR_dpo=1e-4 SEEDS=3 bash examples/compare_objectives.sh
#   ONLY="rmipo my_objectives:Mine" bash examples/compare_objectives.sh
#   ROWS=rows.txt bash examples/compare_objectives.sh     # with lines such as: dpo-0.5 --objective dpo --beta 0.5
#
# With neither HF_MODEL nor DATA it runs on the small embedded example: a training each, about a minute on one CPU core, and two
# or three minutes before them for what all start from. Variables: examples/grid.sh (ONLY, ROWS, SEEDS, STEPS ...) and examples/stages.sh, and
# LR_name, the learning rate of the row of that name (what is neither letter nor digit is _ in it); without it LR, one for all: learning
# rates are NOT tuned here, which favours the objectives that it suits. A row of ROWS without --objective is the objective of its name.
# Printed at the end, and written to WORK_DIR/comparison.md, .csv and .png (needs matplotlib): accuracy before and after, change of
# log-probabilities, speed, memory. docs/comparison.md explains them.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=examples/grid.sh
source "$ROOT/examples/grid.sh"
choose_grid comparison

# Hyperparameters: the paper's table 4 gives ranges; the value used here is our default wherever that lies in the range.
#   rmipo        beta 2, gamma 0.3 to 1.6 (fixed)
#   simpo        beta 2 of 2 4 6 8; gamma 0.5 of 0.3 ... 1.6 (ratio 0.25)
#   simper       none
#   dpo          beta 0.1 of 0.01 0.05 0.1
#   ipo          tau 0.1 of 0.01 0.1 0.5 1
#   slic         lambda 0.1 of 0.1 0.5 1 10; delta 1 (the paper names none)
#   hinge        beta 0.1, as dpo (the paper has no such row)
#   cpo          alpha 1; beta 0.1 of 0.01 0.05 0.1
#   kto          weights 1; beta 0.1 of 0.01 0.05 0.1
#   alpha_dpo    beta 2.5 of 2.5 10; gamma 0.5 of 0.1 0.3 0.5 (ratio 0.2, not our default); alpha 0.1 of 0.01 0.05 0.1 0.2
#   beta_dpo     beta 0.1; alpha 0.6 of 0.4 0.6 0.8 1; rho 0.2 of 0 ... 0.5
#   epsilon_dpo  beta 0.01; epsilon 0.01 of 0.005 0.01 0.02
#   the others   are not in the table: our defaults
GRID_ROWS=(rmipo simpo simper dpo ipo slic hinge cpo kto alpha_dpo beta_dpo epsilon_dpo infopo orpo alpha_po amapo gamma_po
    robust apo_zero apo_down nca_pair bco_pair exo_pair sppo_hard aot_pair sft)
# Objective -> flags, where the default is another value than the one above.
declare -A FLAGS=([alpha_dpo]="--gamma-beta-ratio 0.2")
# The objectives that need the model as it was before; a row that goes on from its own checkpoint has no other way to find it. Adapters
# stand on it.
WITH_REFERENCE=" dpo ipo hinge kto alpha_dpo beta_dpo epsilon_dpo infopo robust apo_zero apo_down nca_pair bco_pair exo_pair"
WITH_REFERENCE+=" sppo_hard aot_pair "

add_own_rows
check_only "${GRID_ROWS[@]}"
prepare_start
for row in "${GRID_ROWS[@]}"; do
    flags_of "$row" "$row"
    if [[ -z "${LORA_RANK:-}" && "$WITH_REFERENCE" == *" $objective "* ]]; then flags+=(--reference-load "$START"); fi
    rate="LR_${row//[^A-Za-z0-9]/_}"
    train_row "$row" --lr "${!rate:-$LR}" "${flags[@]}" "$@"
done

show_tables --view objectives --table "Objectives" "${GRID_ROWS[@]}"
