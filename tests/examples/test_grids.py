"""The scripts that train many rows from one start: their commands are printed, parsed and run through with stand-ins."""

import shutil
from pathlib import Path

import pytest

from megatron_rmipo.config.schema import Config
from megatron_rmipo.objectives.arguments import parse_arguments
from megatron_rmipo.objectives.registry import OBJECTIVES, build_objective
from megatron_rmipo.reports.comparison_cli import build_parser
from megatron_rmipo.training.validation import problems_without_model
from tests.examples.scripts import ROOT, calls, commands, environment, own_inputs, program_of, run_script

ABLATIONS, COMPARISON = "ablations.sh", "compare_objectives.sh"
LLAMA = "run_rmipo_llama3_8b.sh"
GRIDS = {ABLATIONS: "ablations", COMPARISON: "comparison"}
NUM_ROWS = {ABLATIONS: 17, COMPARISON: 26}
# (lower bound, upper bound or constant, signal, schedule) of the rows of rmipo, as the paper's tables describe them.
MARGINS = {
    "rmipo": (0.3, 1.6, "pmi", "exponential"),
    "none": (0.0, 1.0, "gap", "linear"),
    "gm": (None, 1.6, None, "none"),
    "mi": (0.0, 1.0, "pmi", "linear"),
    "ed": (0.0, 1.0, "gap", "exponential"),
    "gm-mi": (0.3, 1.6, "pmi", "linear"),
    "gm-ed": (0.3, 1.6, "gap", "exponential"),
    "mi-ed": (0.0, 1.0, "pmi", "exponential"),
    "cosine": (0.3, 1.6, "pmi", "cosine"),
    "bounds-0-2": (0.0, 2.0, "pmi", "exponential"),
    "bounds-0.5-1.4": (0.5, 1.4, "pmi", "exponential"),
    "bounds-1.0-1.2": (1.0, 1.2, "pmi", "exponential"),
    "rmipo-sums": (0.3, 1.6, "pmi", "exponential"),
}
# The paper's table 4: option -> the values searched; options that are ours alone are left out.
SEARCHED = {
    "rmipo": {"beta": [2.0], "gamma_min": [0.3], "gamma_max": [1.6]},
    "simpo": {"beta": [2.0, 4.0, 6.0, 8.0]},
    "dpo": {"beta": [0.01, 0.05, 0.1]},
    "ipo": {"tau": [0.01, 0.1, 0.5, 1.0]},
    "slic": {"slic_lambda": [0.1, 0.5, 1.0, 10.0]},
    "cpo": {"beta": [0.01, 0.05, 0.1], "sft_weight": [1.0]},
    "kto": {"beta": [0.01, 0.05, 0.1], "desirable_weight": [1.0], "undesirable_weight": [1.0]},
    "alpha_dpo": {"beta": [2.5, 10.0], "alpha": [0.01, 0.05, 0.1, 0.2]},
    "beta_dpo": {"beta": [0.1], "beta_sensitivity": [0.4, 0.6, 0.8, 1.0], "rho": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]},
    "epsilon_dpo": {"beta": [0.01], "epsilon": [0.005, 0.01, 0.02]},
}
SEARCHED_GAMMA = {"simpo": [0.3, 0.5, 1.0, 1.2, 1.4, 1.6], "alpha_dpo": [0.1, 0.3, 0.5]}


def rows(output: str, grid: str) -> dict[str, list[str]]:
    """Row -> the trainer's arguments, of the rows of a grid in a dry run's output."""
    found = {}
    for words in commands(output):
        if "megatron_rmipo.launch" in words:
            save = Path(words[words.index("--save") + 1])
            if save.parent.name == grid:
                found[save.name] = words[words.index("megatron_rmipo.train") + 1 :]
    return found


def parsed(lines: dict[str, list[str]]) -> dict[str, Config]:
    """The rows of objectives that exist, as the trainer itself reads them."""
    return {row: parse_arguments(line) for row, line in lines.items() if line[line.index("--objective") + 1] in OBJECTIVES}


def dry_run(script: str, tmp_path: Path, *flags: str, **variables: str) -> str:
    return run_script(script, environment(tmp_path, DRY_RUN="1", GPUS_PER_NODE="1", **variables), *flags)


@pytest.mark.parametrize("script", GRIDS)
def test_every_row_parses_and_starts_from_the_same(script: str, tmp_path: Path) -> None:
    output = dry_run(script, tmp_path)
    assert not (tmp_path / "work").exists()
    lines = rows(output, GRIDS[script])
    assert len(lines) == NUM_ROWS[script]
    (tables,) = [words for words in commands(output) if any(word.endswith("compare_runs.py") for word in words)]
    assert Path(tables[tables.index("--picture") + 1]).name == f"{GRIDS[script]}.png"
    configs = parsed(lines)
    for row, config in configs.items():
        assert problems_without_model(config) == [], row
        build_objective(config.objective.objective, config.objective.options)
    shared = {
        (config.checkpoint.load, config.checkpoint.finetune, *config.data.data_path, config.training, config.optimizer)
        for config in configs.values()
    }
    assert len(shared) == 1
    assert len({config.checkpoint.save_hf for config in configs.values()}) == len(configs)


@pytest.mark.parametrize("script", GRIDS)
def test_the_reference_is_named_where_the_objective_needs_one(script: str, tmp_path: Path) -> None:
    start = str(tmp_path / "work/sft")
    for row, line in rows(dry_run(script, tmp_path), GRIDS[script]).items():
        assert ("--reference-load" in line) == needs_reference(line), row
        assert "--reference-load" not in line or line[line.index("--reference-load") + 1] == start


def needs_reference(line: list[str]) -> bool:
    name = line[line.index("--objective") + 1]
    if name not in OBJECTIVES:
        return "--reference-load" in line
    needs = OBJECTIVES[name]().needs
    return needs.reference or needs.perturbation is not None


def test_the_margins_of_the_ablations_are_those_of_the_paper(tmp_path: Path) -> None:
    configs = parsed(rows(dry_run(ABLATIONS, tmp_path), "ablations"))
    found = {}
    for row, config in configs.items():
        if config.objective.objective == "rmipo":
            # With the defaults that the options fill in themselves.
            options = build_objective("rmipo", config.objective.options).config
            found[row] = (options.gamma_min, options.gamma_max, options.margin_signal, options.margin_schedule)
            assert options.beta == 2.0
            assert options.length_normalization == (row != "rmipo-sums")
    assert found == MARGINS
    sums = {row: config.objective.options for row, config in configs.items() if row.endswith("-sums")}
    assert all(options["length_normalization"] is False for options in sums.values())
    other = parsed(rows(dry_run(ABLATIONS, tmp_path, PRESET="paper"), "ablations"))
    assert {config.objective.options["preset"] for row, config in other.items() if row in MARGINS} == {"paper"}


def test_every_table_shows_rows_that_are_trained(tmp_path: Path) -> None:
    for script, grid in GRIDS.items():
        output = dry_run(script, tmp_path)
        arguments = build_parser().parse_args(compared(output)[2:])
        assert arguments.runs == tmp_path / "work" / grid
        assert arguments.output == tmp_path / "work" / grid
        named = {row.rpartition("=")[2] for _, *table in arguments.table for row in table}
        assert named == set(rows(output, grid))
    # The default stands in the tables of components, schedules and bounds, and is trained once.
    assert dry_run(ABLATIONS, tmp_path).count("train ablations/rmipo\n") == 1


def test_all_objectives_are_compared_with_searched_hyperparameters(tmp_path: Path) -> None:
    lines = rows(dry_run(COMPARISON, tmp_path), "comparison")
    assert set(OBJECTIVES) <= set(lines)
    for row, config in parsed(lines).items():
        assert config.objective.objective == row
        for option, values in SEARCHED.get(row, {}).items():
            assert config.objective.options[option] in [None, *values], (row, option)
        # The searched margins are not ratios: gamma = beta * ratio.
        if row in SEARCHED_GAMMA:
            gamma = config.objective.options["beta"] * config.objective.options["gamma_beta_ratio"]
            assert gamma in SEARCHED_GAMMA[row], row


def test_rows_lengths_and_learning_rates_can_be_chosen(tmp_path: Path) -> None:
    output = dry_run(COMPARISON, tmp_path, "--seed", "5", ONLY="simpo rmipo", STEPS="7", LR="1e-3", LR_simpo="2e-5")
    configs = parsed(rows(output, "comparison"))
    assert {row: config.optimizer.lr for row, config in configs.items()} == {"rmipo": 1e-3, "simpo": 2e-5}
    assert {(config.training.train_iters, config.training.seed) for config in configs.values()} == {(7, 5)}
    message = run_script(ABLATIONS, environment(tmp_path, ONLY="rmipo cosin"), expect=1)
    assert "no row cosin" in message
    assert "cosine" in message
    assert "set one of them" in run_script(ABLATIONS, environment(tmp_path, STEPS="7", EPOCHS="1"), expect=1)
    assert calls(tmp_path) == []


def test_rows_of_ones_own_are_trained_and_shown_beside_the_others(tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    lines_of_file = ["# name, flags", "", "dpo-0.5 --objective dpo --beta 0.5  # why", "  wide --gamma-max 3"]
    file.write_text("\n".join([*lines_of_file, "ipo.2 --objective=ipo --reference-load START"]))
    own = ["dpo-0.5", "wide", "ipo.2"]
    lines = rows(dry_run(ABLATIONS, tmp_path, ROWS=str(file), ONLY="rmipo dpo-0.5 wide ipo.2", PRESET="paper"), "ablations")
    assert list(lines) == ["rmipo", *own]
    configs = {row: parse_arguments(line) for row, line in lines.items()}
    found = [(config.objective.objective, config.objective.options.get("preset")) for config in configs.values()]
    assert found == [("rmipo", "paper"), ("dpo", None), ("rmipo", "paper"), ("ipo", None)]
    start = str(tmp_path / "work/sft")
    assert [config.model.reference_load for config in configs.values()] == [None, start, None, start]
    assert (configs["dpo-0.5"].objective.options["beta"], configs["wide"].objective.options["gamma_max"]) == (0.5, 3.0)
    assert compared(dry_run(ABLATIONS, tmp_path, ROWS=str(file)))[-5:] == ["Rows of your own, beside rmipo", "rmipo", *own]
    # In the comparison a row without --objective is that of its name, and an objective of one's own need not be in the file.
    file.write_text("dpo-0.5 --objective dpo --beta 0.5\nmine:Loss --lr 1e-5\n")
    output = dry_run(COMPARISON, tmp_path, ROWS=str(file), ONLY="dpo-0.5 mine:Loss pkg.own:Other", LR_pkg_own_Other="5e-5")
    lines = rows(output, "comparison")
    assert [(line[line.index("--objective") + 1], line[line.index("--lr") + 1]) for line in lines.values()] == [
        ("dpo", "3e-4"),
        ("mine:Loss", "3e-4"),
        ("pkg.own:Other", "5e-5"),
    ]
    assert lines["mine:Loss"][-2:] == ["--lr", "1e-5"]
    assert compared(output)[-4:] == ["sft", "dpo-0.5", "mine:Loss", "pkg.own:Other"]


def compared(output: str) -> list[str]:
    """The command that shows the tables."""
    (command,) = [words for words in commands(output) if words[0] == "python" and "compare_runs" in words[1]]
    return command


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("rmipo --beta 3", "line 2: there is a row rmipo already"),
        ("a/b --beta 3", "line 2: a/b cannot be the name of a row"),
        ("x.seed-2 --beta 3", "line 2: x.seed-2 cannot be the name of a row"),
        ("x beta=3", "line 2: x is followed by beta=3; a line is a name and flags"),
    ],
)
def test_a_line_that_is_no_row_is_named(line: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text(f"# mine\n{line}\n")
    message = run_script(ABLATIONS, environment(tmp_path, ROWS=str(tmp_path / "rows.txt")), expect=1)
    assert told in message
    assert calls(tmp_path) == []


def test_each_row_is_trained_with_each_seed(tmp_path: Path) -> None:
    configs = parsed(rows(dry_run(COMPARISON, tmp_path, ONLY="rmipo dpo", SEEDS="3"), "comparison"))
    assert {row: config.training.seed for row, config in configs.items()} == {
        f"{name}{folder}": 1234 + number
        for name in ("rmipo", "dpo")
        for number, folder in enumerate(("", ".seed-1235", ".seed-1236"))
    }
    assert len({config.checkpoint.save_hf for config in configs.values()}) == 6
    # The same pairs, the same start, the same place in the tables.
    output = dry_run(COMPARISON, tmp_path, "--seed", "5", ONLY="rmipo", SEEDS="2")
    assert [config.training.seed for config in parsed(rows(output, "comparison")).values()] == [5, 6]
    assert "seed-6 " not in output.partition("== tables")[2]
    for seeds in ("0", "two"):
        assert f"SEEDS={seeds}" in run_script(COMPARISON, environment(tmp_path, SEEDS=seeds), expect=1)
    assert "ROWS=absent" in run_script(COMPARISON, environment(tmp_path, ROWS="absent"), expect=1)
    assert calls(tmp_path) == []


def test_own_inputs_train_without_the_embedded_ones(tmp_path: Path) -> None:
    output = dry_run(ABLATIONS, tmp_path, HF_MODEL="/models/m", DATA="pairs.jsonl")
    (*_, config) = parsed(rows(output, "ablations")).values()
    assert "embedded" not in output
    assert (config.training.global_batch_size, config.optimizer.lr, config.training.epochs) == (128, 6e-7, 1.0)
    assert config.model.bf16
    assert config.checkpoint.load == str(tmp_path / "work/base")


def test_complete_rows_are_skipped_and_interrupted_ones_go_on(tmp_path: Path) -> None:
    variables = environment(tmp_path, **own_inputs(tmp_path), ONLY="rmipo cosine")
    run_script(ABLATIONS, variables | {"INTERRUPTED": "1", "STEP": "40"}, expect=75)
    (training,) = [call for call in calls(tmp_path) if "megatron_rmipo.launch" in call]
    assert "/work/ablations/rmipo " in training
    run_script(ABLATIONS, variables)
    trainings = [call for call in calls(tmp_path) if "megatron_rmipo.launch" in call]
    work = tmp_path / "work"
    assert [f"--load {work}/ablations/rmipo --save" in call for call in trainings] == [True, False]
    assert [f"--load {work}/base --finetune" in call for call in trainings] == [False, True]
    output = run_script(ABLATIONS, variables | {"ONLY": "rmipo cosine gm"})
    assert output.count(": already there") == 4
    assert [*map(program_of, calls(tmp_path))] == ["megatron_rmipo.launch", "tools/compare_runs.py"]
    # Another length is another training.
    message = run_script(ABLATIONS, variables | {"STEPS": "9"}, expect=1)
    assert "other settings" in message
    assert f"rm -r {work}/ablations/rmipo {work}/ablations-models/rmipo" in message
    assert "--train-iters 9" in message


def test_a_row_that_fails_keeps_no_other_from_being_trained(tmp_path: Path) -> None:
    variables = environment(tmp_path, **own_inputs(tmp_path), ONLY="rmipo gm cosine", FAILS="margin-schedule none")
    message = run_script(ABLATIONS, variables, expect=1)
    assert "rows failed" in message
    assert message.strip().endswith(": gm")
    called = calls(tmp_path)
    assert [Path(call.split(" --save ")[1].split()[0]).name for call in called if "megatron_rmipo.launch" in call] == [
        "rmipo",
        "gm",
        "cosine",
    ]
    assert "compare_runs" in called[-1]
    # Nothing of it is left, so it starts anew; a stage that all rows need does end the script.
    run_script(ABLATIONS, variables | {"FAILS": "no command"})
    assert "--finetune" in calls(tmp_path)[0]
    shutil.rmtree(tmp_path / "work/base")
    run_script(ABLATIONS, variables | {"FAILS": "convert_hf"}, expect=9)


def test_checkpoints_of_complete_rows_can_be_dropped(tmp_path: Path) -> None:
    variables = environment(tmp_path, **own_inputs(tmp_path), ONLY="rmipo", STEP="64", REMOVE_CHECKPOINTS="1")
    run = tmp_path / "work/ablations/rmipo"
    (run / "logs").mkdir(parents=True)
    run_script(ABLATIONS, variables)
    assert [path.name for path in run.iterdir()] == ["logs"]
    calls(tmp_path)
    assert "train ablations/rmipo: already there" in run_script(ABLATIONS, variables)
    assert [call.split()[0] for call in calls(tmp_path)] == ["python"]


def test_the_embedded_start_is_shared_with_the_main_example(tmp_path: Path) -> None:
    variables = environment(tmp_path)
    run_script(LLAMA, variables)
    calls(tmp_path)
    run_script(COMPARISON, variables | {"ONLY": "rmipo"})
    assert [*map(program_of, calls(tmp_path))] == ["megatron_rmipo.launch", "tools/compare_runs.py"]
    assert (ROOT / "tools/compare_runs.py").is_file()
