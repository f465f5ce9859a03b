"""The stages of a script, run through with stand-ins: in order, once, made again or refused; signals, failures, several nodes."""

import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.examples.scripts import (
    LLAMA,
    LORA,
    TWO_NODES,
    calls,
    commands,
    environment,
    own_inputs,
    program_of,
    run_script,
    start_script,
    trainings,
    wait_until_called,
)


def test_stages_run_in_order_and_are_skipped_when_complete(tmp_path: Path) -> None:
    variables = environment(tmp_path)
    run_script(LLAMA, variables)
    programs = [program for program in map(program_of, calls(tmp_path)) if program != "megatron_rmipo.launch"]
    assert programs == [
        "examples/embedded/make_inputs.py",
        "tools/preprocess_preferences.py",
        "tools/preprocess_preferences.py",
        "tools/convert_hf_to_megatron.py",
        "tools/preprocess_preferences.py",
        "tools/summarize_run.py",
        "tools/report.py",
    ]
    output = run_script(LLAMA, variables)
    assert [*map(program_of, calls(tmp_path))] == ["tools/summarize_run.py", "tools/report.py"]
    assert output.count("already there") == 7


def test_only_what_is_missing_is_made_again(tmp_path: Path) -> None:
    variables = environment(tmp_path)
    run_script(LLAMA, variables)
    calls(tmp_path)
    (tmp_path / "work/data/valid.json").unlink()
    run_script(LLAMA, variables)
    assert ["valid" in call for call in calls(tmp_path)] == [True, False, False]


def test_a_result_of_other_settings_is_not_used_silently(tmp_path: Path) -> None:
    inputs = own_inputs(tmp_path)
    run_script(LLAMA, environment(tmp_path, **inputs))
    message = run_script(LLAMA, environment(tmp_path, **{**inputs, "DATA": "others.jsonl"}), expect=1)
    assert f"  then: data {tmp_path}/pairs.jsonl" in message
    assert "  now:  data others.jsonl (no file there)" in message
    assert "WORK_DIR" in message
    message = run_script(LLAMA, environment(tmp_path, **inputs), "--epochs", "3", expect=1)
    assert "other settings" in message
    # Another layout trains the same model.
    layout = ["--context-parallel-size", "2", "--recompute-modules", "core_attn", "mlp", "--no-sequence-parallel"]
    run_script(LLAMA, environment(tmp_path, **inputs, GPUS_PER_NODE="4"), *layout)
    message = run_script(LLAMA, environment(tmp_path, **inputs), *layout, "--seed", "5", expect=1)
    assert "  now:  --seed 5\n" in message
    assert "core_attn" not in message


def test_an_interrupted_training_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    inputs = own_inputs(tmp_path)
    output = run_script(LLAMA, environment(tmp_path, **inputs, INTERRUPTED="1", STEP="40"), "--exit-interval", "40", expect=75)
    assert f"stopped before its end; step 40 is saved in {tmp_path}/work/rmipo; start this script again to go on" in output
    assert "failed" not in output
    first = calls(tmp_path)
    assert program_of(first[-1]) == "megatron_rmipo.launch"
    assert "--finetune" in first[-1]
    # Neither the layout, how it is cut, nor when it saves and stops is part of what is trained.
    changed = ["--async-save", "--save-interval", "20", "--min-microbatches-per-stage", "3"]
    output = run_script(LLAMA, environment(tmp_path, **inputs, GPUS_PER_NODE="4"), *changed)
    assert "goes on from the latest checkpoint" in output
    training, summary, report = calls(tmp_path)
    assert f"--load {tmp_path}/work/rmipo --save" in training
    assert "--finetune" not in training
    assert ("summarize_run" in summary, "report" in report) == (True, True)


def test_a_run_that_died_in_its_first_save_starts_anew(tmp_path: Path) -> None:
    variables = environment(tmp_path, **own_inputs(tmp_path))
    half = tmp_path / "work/rmipo/iter_0000010.incomplete"
    half.mkdir(parents=True)
    run_script(LLAMA, variables)
    assert "--finetune" in calls(tmp_path)[-3]
    assert not half.exists()


@pytest.mark.parametrize("interrupted", ["", "1"])
def test_other_settings_never_reuse_a_checkpoint(tmp_path: Path, interrupted: str) -> None:
    variables = environment(tmp_path, **own_inputs(tmp_path))
    run_script(LLAMA, variables | {"INTERRUPTED": interrupted, "STEP": "40"}, expect=75 if interrupted else 0)
    work = tmp_path / "work"
    # The printed remedy, followed by half: the finished checkpoint is still there and would be exported as the new result.
    shutil.rmtree(work / "hf", ignore_errors=True)
    calls(tmp_path)
    for _ in range(2):
        message = run_script(LLAMA, variables | {"LR": "1e-6"}, expect=1)
        assert f"rm -r {work}/rmipo {work}/hf" in message
        assert "--lr 1e-6" in next(line for line in message.splitlines() if line.startswith("  now:"))
        assert calls(tmp_path) == []
    shutil.rmtree(work / "rmipo")
    run_script(LLAMA, variables | {"LR": "1e-6"})
    assert "--finetune" in calls(tmp_path)[0]


def test_an_export_that_was_removed_is_made_again_from_the_checkpoint(tmp_path: Path) -> None:
    variables = environment(tmp_path, **own_inputs(tmp_path))
    run_script(LLAMA, variables)
    shutil.rmtree(tmp_path / "work/hf")
    calls(tmp_path)
    run_script(LLAMA, variables)
    assert f"--load {tmp_path}/work/rmipo --save" in calls(tmp_path)[0]


def test_a_training_from_other_results_is_not_used_silently(tmp_path: Path) -> None:
    inputs = own_inputs(tmp_path)
    variables = environment(tmp_path, **inputs, SFT_DATA=str(tmp_path / "sft.jsonl"))
    run_script(LLAMA, variables)
    work = tmp_path / "work"
    model, pairs = tmp_path / "model", tmp_path / "pairs.jsonl"
    # The same contents under other names, and written anew.
    moved = {
        "HF_MODEL": str(shutil.copytree(model, tmp_path / "other")),
        "DATA": str(shutil.copy(pairs, tmp_path / "moved.jsonl")),
    }
    assert run_script(LLAMA, variables | moved).count("already there") == 5
    (model / "config.json").write_text('{"changed": 1}')
    changed = variables
    # The remedies one after another, as a user follows them: each stage that stands on the changed one is refused in turn.
    for stage, remedy in (
        ("preprocess train", [*work.glob("data/train.*")]),
        ("convert the model", [work / "base"]),
        ("preprocess sft", [*work.glob("data/sft.*")]),
        ("train sft", [work / "sft", work / "sft-hf"]),
        ("train rmipo", [work / "rmipo", work / "hf"]),
    ):
        message = run_script(LLAMA, changed, expect=1)
        assert f"{stage}: " in message
        assert "made with other settings, or from something else" in message
        assert f"  then: {'from convert the model: ' if stage == 'train sft' else ''}" in message
        assert "config.json: 2 bytes, sha256 " in message
        assert "config.json: 14 bytes, sha256 " in message
        for path in remedy:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    run_script(LLAMA, changed)
    # Without the fine-tuning the preference training starts elsewhere.
    assert "train rmipo: " in run_script(LLAMA, changed | {"SFT_DATA": ""}, expect=1)


def test_the_flags_that_an_error_of_the_data_names_reach_the_tool(tmp_path: Path) -> None:
    variables = environment(tmp_path, **own_inputs(tmp_path), VALID_DATA=str(tmp_path / "sft.jsonl"))
    flags = {"DATA_FLAGS": "--columns prompt=question  --keep-ties", "VALID_FLAGS": "--format hh"}
    run_script(LLAMA, variables | flags)
    train, valid = [call for call in calls(tmp_path) if "preprocess_preferences.py" in call]
    assert "--columns prompt=question --keep-ties" in train
    assert "--format hh" in valid
    assert "made with other settings" in run_script(LLAMA, variables | flags | {"VALID_FLAGS": ""}, expect=1)


def test_the_number_of_workers_changes_no_data(tmp_path: Path) -> None:
    inputs = own_inputs(tmp_path)
    run_script(LLAMA, environment(tmp_path, **inputs, WORKERS="3"))
    assert "--workers 3" in calls(tmp_path)[0]
    assert "preprocess train: already there" in run_script(LLAMA, environment(tmp_path, **inputs, WORKERS="5"))


@pytest.mark.parametrize(("status", "expected"), [("75", 75), ("143", 75), ("3", 3)])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_launcher_and_its_status_comes_back(
    tmp_path: Path, sent: signal.Signals, status: str, expected: int
) -> None:
    script = start_script(environment(tmp_path, **own_inputs(tmp_path), HANGS="megatron_rmipo.train", STATUS=status))
    wait_until_called(tmp_path, "hanging")
    script.send_signal(sent)
    output, _ = script.communicate(timeout=30)
    assert script.returncode == expected, output
    assert calls(tmp_path)[-2:] == [f"heard {sent.name.removeprefix('SIG')}", "saved"]
    assert ("stopped by a signal; start this script again" in output) == (expected == 75)
    assert (tmp_path / "work/.stages/ended").read_text() == f"train rmipo: exit status {expected}\n"


def test_a_failed_command_ends_the_script_with_its_status(tmp_path: Path) -> None:
    run_script(LLAMA, environment(tmp_path, **own_inputs(tmp_path), FAILS="convert_hf_to_megatron"), expect=9)
    assert "convert" in calls(tmp_path)[-1]
    assert "convert the model: exit status 9" in (tmp_path / "work/.stages/ended").read_text()


def test_other_nodes_do_not_wait_for_a_first_node_that_failed(tmp_path: Path) -> None:
    inputs = own_inputs(tmp_path)
    first, second = (environment(tmp_path, **inputs, **TWO_NODES, NODE_RANK=rank) for rank in ("0", "1"))
    run_script(LLAMA, first | {"FAILS": "preprocess"}, expect=9)
    message = run_script(LLAMA, second | {"FAILURE_GRACE_SECONDS": "1"}, expect=1)
    assert "the first node has failed (preprocess train: exit status 9)" in message
    (tmp_path / "work/.stages/ended").write_text("convert the model: exit status 75")
    message = run_script(LLAMA, second | {"FAILURE_GRACE_SECONDS": "1"}, expect=75)
    assert "the first node has stopped; start this script again" in message
    # The note of an earlier start goes when the first node starts again.
    waiting = start_script(second | {"FAILURE_GRACE_SECONDS": "20"})
    time.sleep(1)
    run_script(LLAMA, first)
    output, _ = waiting.communicate(timeout=30)
    assert waiting.returncode == 0, output
    assert not (tmp_path / "work/.stages/ended").exists()


def test_other_nodes_wait_only_so_long(tmp_path: Path) -> None:
    variables = environment(tmp_path, **own_inputs(tmp_path), **TWO_NODES, NODE_RANK="1", STAGE_TIMEOUT_MINUTES="0")
    message = run_script(LLAMA, variables, expect=1)
    assert "within 0 minutes" in message
    assert "STAGE_TIMEOUT_MINUTES" in message
    assert calls(tmp_path) == []


def test_the_base_setting_starts_from_its_own_fine_tuning(tmp_path: Path) -> None:
    variables = environment(
        tmp_path, DRY_RUN="1", HF_MODEL="m", DATA="d", SFT_DATA="s", CHAT_TEMPLATE="llama3", DATA_SPLIT="train_prefs"
    )
    output = run_script(LLAMA, variables)
    sft, rmipo = trainings(output)
    assert (sft.objective.objective, sft.optimizer.lr) == ("sft", 2e-5)
    assert rmipo.checkpoint.load == sft.checkpoint.save
    prepared = [" ".join(command) for command in commands(output) if "preprocess" in command[1]]
    assert all("--chat-template llama3" in command for command in prepared)
    assert ["--split train_prefs" in command for command in prepared] == [True, False]


@pytest.mark.parametrize(("yes", "last"), [({}, ["me/it"]), ({"PUSH_YES": "1"}, ["me/it", "--yes"])])
def test_the_result_goes_to_the_hub_where_that_is_asked_for(tmp_path: Path, yes: dict[str, str], last: list[str]) -> None:
    variables = environment(tmp_path, DRY_RUN="1", HF_MODEL="m", DATA="d", PUSH_TO_HUB="me/it", **yes)
    *_, command, report = commands(run_script(LLAMA, variables))
    assert command[1].endswith("tools/push_to_hub.py")
    assert report[1].endswith("tools/report.py")
    assert command[3:] == last


def test_an_adapter_stands_on_the_fine_tuned_model_beside_the_results_of_all_weights(tmp_path: Path) -> None:
    work = tmp_path / "work"
    variables = environment(tmp_path)
    run_script(LLAMA, variables)
    calls(tmp_path)
    output = run_script(LORA, variables | {"MERGE": "1"})
    assert output.count("already there") == 6, "what both start from is made once"
    training, merging, summary, report = calls(tmp_path)
    for words in (
        "--lora-rank 16 --lora-alpha 32 --log-interval 5",
        f"--load-hf {work}/sft-hf --save {work}/rmipo-lora --save-adapter {work}/adapter --objective rmipo",
        "--lr 1e-3",
    ):
        assert words in training
    assert merging.endswith(f"merge_adapter.py --load-adapter {work}/adapter --base-hf {work}/sft-hf --save-hf {work}/merged-hf")
    assert f"--model {work}/merged-hf" in summary
    assert report.endswith(f"{work}/rmipo-lora --output {work}/report-lora.html")
    run_script(LORA, variables | {"MERGE": "1"})
    assert [*map(program_of, calls(tmp_path))] == ["tools/summarize_run.py", "tools/report.py"]
    # Another adapter is another result.
    message = run_script(LORA, variables | {"LORA_RANK": "8"}, expect=1)
    assert f"rm -r {work}/rmipo-lora {work}/adapter" in message
    assert "--lora-rank 8" in message


def test_an_adapter_of_any_script_goes_on_from_its_checkpoint_and_its_model(tmp_path: Path) -> None:
    variables = environment(tmp_path, **own_inputs(tmp_path), LORA_RANK="4")
    run_script(LLAMA, variables | {"INTERRUPTED": "1", "STEP": "40"}, expect=75)
    model, work = tmp_path / "model", tmp_path / "work"
    # Nothing is converted: it is read as it is.
    first = calls(tmp_path)
    assert [*map(program_of, first)] == ["tools/preprocess_preferences.py", "megatron_rmipo.launch"]
    assert f"--load-hf {model} --save" in first[-1]
    run_script(LLAMA, variables)
    assert f"--load-hf {model} --load {work}/rmipo-lora --save {work}/rmipo-lora" in calls(tmp_path)[0]
    for alone in ({"LORA_ALPHA": "8"}, {"MERGE": "1"}):
        assert "LORA_RANK=16" in run_script(LLAMA, environment(tmp_path, **own_inputs(tmp_path), **alone), expect=1)
