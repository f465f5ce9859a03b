"""Runs of the trainer through its command line: resume, layouts, signals, steps that are skipped."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rmipo.checkpoint import makers
from megatron_rmipo.checkpoint.megatron.store import CheckpointSaver
from megatron_rmipo.command import FAULT_OF_OURS, STOPPED
from megatron_rmipo.data.preparing.preprocess_cli import main as preprocess
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.training import main as trainer
from megatron_rmipo.training import resume
from megatron_rmipo.training.course import evaluation
from tests.checkpoint.models import flip_bit, write_hf_model
from tests.data.tokenizers import save_byte_bpe
from tests.harness import free_port, run_distributed
from tests.integration.data import CHAT, MODEL, write_pairs, write_unpaired

STEPS = 6


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "data" / "pairs")


def flags(prefix: Path, save: Path, **changes: Any) -> list[str]:
    """Arguments of a short run; a change of None leaves a flag out, True gives it without a value."""
    settings: dict[str, Any] = {
        "load_hf": MODEL,
        "data_path": prefix,
        "split": "40,8",
        "save": save,
        "seq_length": 400,
        "tokens_per_microbatch": 700,
        "global_batch_size": 6,
        "train_iters": STEPS,
        "lr": 1e-3,
        "lr_warmup_iters": 2,
        "weight_decay": 0.1,
        "num_workers": 0,
        **changes,
    }
    arguments: list[str] = []
    for name, value in settings.items():
        if value is not None:
            flag = "--" + name.replace("_", "-")
            arguments += [flag] if value is True else [flag, str(value)]
    return arguments


def run(arguments: list[str]) -> int:
    return trainer.main(arguments)


def output_of(function: Callable[[list[str]], Any], arguments: list[str]) -> tuple[Any, str]:
    """What the function returns, and what its process writes: ranks are no children of the test, so it cannot capture them."""
    written = Path(tempfile.mkdtemp()) / "output"
    with written.open("w") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
        result = function(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    return result, written.read_text()


def records(save: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = (save / "logs" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(save: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(save)}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.dist
def test_a_run_saves_reports_and_exports(prefix: Path, tmp_path: Path) -> None:
    save, exported = tmp_path / "run", tmp_path / "exported"
    (tmp_path / "prompts.txt").write_text("what is red?\nhello\n")
    samples: dict[str, Any] = {"sample_prompts": tmp_path / "prompts.txt", "sample_interval": 4, "sample_length": 3}
    arguments = flags(prefix, save, save_hf=exported, eval_interval=3, save_interval=4, async_save=True, **samples)
    code, output = run_distributed(output_of, 1, run, arguments)[0]
    assert code == 0, output
    before = output[: output.index("eval at step 0/6")].splitlines()
    # Warnings of other packages have a second line, of code.
    first_words = [line for line in before if "warn" not in line.lower() and not line.startswith("  ")]
    assert len(first_words) <= 10, first_words
    num_parameters = sum(tensor.numel() for tensor in weights(MODEL).values())
    said = [f"model: {num_parameters:,} parameters (llama), from {MODEL}", "data: 40 pairs to train on, 8 held out"]
    said += ["length: 6 steps of 6 pairs, 0.9 epochs", "layout: 1 rank (TP 1 x PP 1 x DP 1)", "precision: fp32; attention sdpa"]
    said += [f"checkpoints: {save} every 4 steps; final model: {exported}", f"config.yaml: {save / 'logs'}"]
    assert [words for words in said if not any(words in line for line in first_words)] == [], first_words
    steps = records(save)
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert [record["step"] for record in records(save, "eval")] == [0, 3, 6]
    shown = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "gamma", "dpmi", "gamma/p50"}
    shown |= {"dpmi/p95", "logps/chosen", "logps/rejected", "grad_norm", "lr", "pairs_per_second", "tokens_per_second"}
    shown |= {"tflops_per_device", "padding_share", "memory_gib", "skipped_steps", "consumed_pairs"}
    assert shown <= steps[0].keys()
    answers = [json.loads(line) for line in (save / "logs" / "samples.jsonl").read_text().splitlines()]
    assert [(one["step"], one["prompt"]) for one in answers] == [(step, prompt) for step in (0, 4, STEPS) for prompt in (0, 1)]
    assert answers[0].keys() == {"step", "prompt", "text", "answer", "num_tokens", "ended"}
    assert all(one["num_tokens"] == 3 or one["ended"] for one in answers)
    assert [record["lr"] for record in steps[:3]] == pytest.approx([0.0, 5e-4, 1e-3], rel=1e-2)
    assert {path.name for path in save.iterdir()} >= {"iter_0000004", "iter_0000006", "latest_checkpointed_iteration.txt"}
    assert (save / "latest_checkpointed_iteration.txt").read_text().strip() == "6"
    assert (save / "logs" / "config.yaml").is_file()
    for directory in (save / "iter_0000006" / "hf", exported):
        assert AutoTokenizer.from_pretrained(directory).chat_template == CHAT.template
        _, front, card = (directory / "README.md").read_text().split("---\n", 2)
        assert yaml.safe_load(front)["tags"][-2:] == ["rmipo", "arxiv:2604.24804"]
        assert "| steps | 6 |" in card
        assert str(tmp_path) not in card, "a path of this machine"
    evaluations = records(save, "eval")
    assert f"| preference accuracy | {evaluations[0]['rewards/accuracies']:.3f}" in card
    assert "at steps 0 and 6, 8 held-out pairs" in card
    before, after = weights(MODEL), weights(exported)
    assert before.keys() == after.keys()
    assert all(before[name].shape == after[name].shape for name in before)
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


SHARDED = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "extra"), [(1, []), (1, ["--bf16"]), (2, ["--bf16", *SHARDED])], ids=["fp32", "bf16", "sharded"]
)
def test_a_resumed_run_is_the_run_that_was_not_stopped_to_the_bit(
    prefix: Path, tmp_path: Path, ranks: int, extra: list[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert set(run_distributed(run, ranks, [*flags(prefix, whole, save_hf=tmp_path / "whole-hf"), *extra])) == {0}
    stopped = [*flags(prefix, parts, load=parts, exit_interval=3, save_hf=tmp_path / "parts-hf"), *extra]
    assert set(run_distributed(run, ranks, stopped)) == {STOPPED}
    assert sorted(losses(parts)) == [1, 2, 3]
    assert not (tmp_path / "parts-hf").exists()
    resumed = [*flags(prefix, parts, load=parts, save_hf=tmp_path / "parts-hf"), *extra]
    assert set(run_distributed(run, ranks, resumed)) == {0}
    assert losses(parts) == losses(whole)
    before, after = weights(tmp_path / "whole-hf"), weights(tmp_path / "parts-hf")
    assert all(torch.equal(before[name], after[name]) for name in before)


def run_of_before(arguments: list[str]) -> int:
    """A run that knows no order but the one of versions before, and saves no name of it."""

    save = CheckpointSaver.save

    def save_without_order(self: CheckpointSaver, *where: Any, train_state: dict[str, Any], **further: Any) -> Path:
        assert train_state.pop("order") == ""
        return save(self, *where, train_state=train_state, **further)

    with mock.patch.object(resume, "NEW_ORDER", ""), mock.patch.object(CheckpointSaver, "save", save_without_order):
        return run(arguments)


@pytest.mark.dist
def test_a_run_of_before_goes_on_in_its_order_to_the_bit(prefix: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    once = {"lr_warmup_iters": None, "num_workers": 1}
    assert run_distributed(run_of_before, 1, flags(prefix, whole, **once)) == [0]
    assert run_distributed(run_of_before, 1, flags(prefix, parts, load=parts, exit_interval=3, **once)) == [STOPPED]
    assert run_distributed(run, 1, flags(prefix, parts, load=parts, **once)) == [0]
    assert losses(parts) == losses(whole)


@pytest.mark.dist
def test_overlapped_and_sharded_updates_save_the_same_weights(prefix: Path, tmp_path: Path) -> None:
    exported = []
    for name, extra in (("plain", []), ("sharded", SHARDED)):
        out = tmp_path / f"{name}-hf"
        arguments = flags(prefix, tmp_path / name, save_hf=out, split=None, train_iters=2, lr_warmup_iters=None)
        assert run_distributed(run, 2, [*arguments, *extra]) == [0, 0]
        exported.append(weights(out))
    for name, tensor in exported[0].items():
        torch.testing.assert_close(exported[1][name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.dist
def test_a_resume_that_would_change_the_order_of_pairs_is_refused(prefix: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    assert run_distributed(run, 1, flags(prefix, save, exit_interval=1)) == [STOPPED]
    code, output = run_distributed(output_of, 1, run, flags(prefix, save, load=save, global_batch_size=5))[0]
    assert code == 1
    assert "--global-batch-size was 6, is 5" in output
    assert "--finetune" in output


@pytest.mark.dist
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(prefix: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    assert run_distributed(run, 2, flags(prefix, save, save_interval=2, exit_interval=4)) == [STOPPED, STOPPED]
    first = losses(save)
    flip_bit(save / "iter_0000004" / "__1_0.distcp")
    (_, told), (_, silent) = run_distributed(output_of, 2, run, flags(prefix, save, load=save, keep_last=1))
    assert "iter_0000004 is damaged: __1_0.distcp does not hold what was written" in told
    assert "from step 2" in told
    assert "is damaged" not in silent
    assert {step: loss for step, loss in losses(save).items() if step in first} == first
    names = {path.name for path in save.iterdir()}
    assert names == {"iter_0000002", "iter_0000004.set_aside", "iter_0000006", "latest_checkpointed_iteration.txt", "logs"}
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "6"


@pytest.mark.dist
def test_a_run_goes_on_at_another_layout(prefix: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    distributed = {"use_distributed_optimizer": True}
    assert run_distributed(run, 1, flags(prefix, whole, **distributed)) == [0]
    first = flags(prefix, parts, exit_interval=2, tensor_model_parallel_size=2, sequence_parallel=True, **distributed)
    assert run_distributed(run, 2, first) == [STOPPED, STOPPED]
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    for until, layout in ((3, {"context_parallel_size": 2}), (4, {}), (5, {"context_parallel_size": 2, "cp_comm_type": "a2a"})):
        second = flags(prefix, parts, load=parts, exit_interval=until, **overlap, **layout, **distributed)
        assert run_distributed(run, 2, second) == [STOPPED, STOPPED]
    staged_flags = {
        "pipeline_model_parallel_size": 2,
        "num_virtual_stages_per_pipeline_rank": 2,
        "min_microbatches_per_stage": 2,
    }
    third = flags(prefix, parts, load=parts, **staged_flags, **overlap, **distributed)
    assert run_distributed(run, 2, third) == [0, 0]
    staged = records(parts)[5:]
    # Of six pairs, four packs in each pass, two for each stage, through two chunks of each.
    assert [record["pipeline_bubble/even"] for record in staged] == pytest.approx([1 / 9])
    assert all(0.05 < record[f"pipeline_bubble{kind}"] < 1 for record in staged for kind in ("", "/measured"))
    assert not any("pipeline_bubble" in record for record in records(parts)[:5])
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    norms = [{record["step"]: record["grad_norm"] for record in records(save)} for save in (parts, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


# How a line of a run begins.
_TITLES = "model|data|objective|log p\\(y\\)|length|optimizer|layout|precision|checkpoints|logs, and|warning|note|stopped"
OURS = re.compile(rf"({_TITLES})[^:]*: |(eval at )?step +\d")


def start_two_ranks(arguments: list[str]) -> subprocess.Popen[str]:
    """Two ranks by the launcher, returned when the second step is on record."""
    command = [sys.executable, "-m", "megatron_rmipo.launch", "--nproc-per-node", "2", "--master-port", str(free_port())]
    process = subprocess.Popen(
        [*command, "-m", "megatron_rmipo.train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    metrics = Path(arguments[arguments.index("--save") + 1]) / "logs" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and '"step": 2,' in metrics.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return process


@pytest.mark.dist
@pytest.mark.parametrize(
    ("num_workers", "sent", "to"),
    [(0, signal.SIGINT, "launcher"), (2, signal.SIGTERM, "rank"), (2, signal.SIGTERM, "all")],
)
def test_a_signal_saves_and_ends_the_run(prefix: Path, tmp_path: Path, num_workers: int, sent: signal.Signals, to: str) -> None:
    save = tmp_path / "run"
    arguments = flags(prefix, save, train_iters=5000, use_distributed_optimizer=True, num_workers=num_workers)
    process = start_two_ranks(arguments)
    launcher = psutil.Process(process.pid)
    # Slurm signals every process of a step itself.
    everything = [*launcher.children(recursive=True), launcher]
    for one in {"launcher": [launcher], "rank": launcher.children()[:1], "all": everything}[to]:
        one.send_signal(sent)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == STOPPED, output
    steps = max(losses(save))
    assert output.splitlines()[-1] == f"stopped: Step {steps} is saved; go on with --load {save}."
    assert "Traceback" not in output
    assert (save / f"iter_{steps:07d}" / "metadata.json").is_file(), output
    assert (save / "latest_checkpointed_iteration.txt").read_text().strip() == str(steps)
    foreign = [line for line in output.splitlines() if not OURS.match(line)]
    assert foreign == [], "lines of other packages"


@pytest.mark.dist
def test_all_ranks_stop_when_one_dies_and_the_cause_is_shown(prefix: Path, tmp_path: Path) -> None:
    process = start_two_ranks(flags(prefix, tmp_path / "run", train_iters=5000))
    ranks = [child for child in psutil.Process(process.pid).children() if "megatron_rmipo.train" in child.cmdline()]
    victim = next(rank for rank in ranks if rank.environ()["RANK"] == "1")
    victim.kill()
    output = process.communicate(timeout=120)[0]
    assert process.returncode == FAULT_OF_OURS
    assert output.splitlines()[-1].startswith(f"rank 1 (process {victim.pid}) was ended by SIGKILL")
    assert not any(rank.is_running() for rank in ranks)


def run_with_a_signal(arguments: list[str], where: str, call: int) -> int:
    """Run, the first rank receiving SIGTERM at a call of an evaluation's batch or of the export; the exit code."""
    calls: list[int] = []

    def signalled(original: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == call and os.environ["RANK"] == "0":
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **options)

        return called

    if where == "evaluation":
        evaluation.evaluate_batch = signalled(evaluation.evaluate_batch)
    else:
        makers.export_hf = signalled(makers.export_hf)
    return trainer.main(arguments)


@pytest.mark.dist
@pytest.mark.slow
def test_a_signal_within_an_evaluation_or_the_export_loses_nothing(prefix: Path, tmp_path: Path) -> None:
    save, exported = tmp_path / "run", tmp_path / "exported"
    plain = flags(prefix, save, load=save, eval_interval=3)
    arguments = [*plain, "--save-hf", str(exported)]
    # An evaluation has two batches of 6 pairs: at the start, after step 3, after the last step. Then the export.
    for where, call, saved, evaluations in (
        ("evaluation", 1, None, []),
        ("evaluation", 3, 3, [0]),
        ("evaluation", 3, 6, [0, 3]),
        ("export", 1, 6, [0, 3, 6]),
    ):
        given = arguments if where == "export" else plain
        assert run_distributed(run_with_a_signal, 2, given, where, call) == [STOPPED, STOPPED]
        assert [record["step"] for record in records(save, "eval")] == evaluations
        assert (save / f"iter_{saved or 0:07d}").exists() == (saved is not None)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith("exported")]
    assert run_distributed(run, 2, arguments) == [0, 0]
    assert [record["step"] for record in records(save, "eval")] == [0, 3, 6]
    whole = tmp_path / "whole"
    assert run_distributed(run, 2, flags(prefix, whole, save_hf=tmp_path / "whole-hf", eval_interval=3)) == [0, 0]
    assert losses(save) == losses(whole)
    before, after = weights(tmp_path / "whole-hf"), weights(exported)
    assert all(torch.equal(before[name], after[name]) for name in before)


def run_with_a_poisoned_pair(arguments: list[str]) -> int:
    """Run with an objective whose second call gives a loss that is not finite; the exit code."""
    from megatron_rmipo.objectives.rmipo import Rmipo

    original, calls = Rmipo.__call__, []

    def poisoned(self: Rmipo, logps: Any) -> Any:
        output = original(self, logps)
        calls.append(1)
        if len(calls) == 2:
            output.losses[0] *= math.nan
        return output

    Rmipo.__call__ = poisoned  # type: ignore[method-assign]
    return trainer.main(arguments)


@pytest.mark.dist
def test_a_step_that_is_not_finite_is_skipped_named_and_counted(prefix: Path, tmp_path: Path) -> None:
    arguments = flags(prefix, tmp_path / "run", tokens_per_microbatch=5000, split=None)
    code, output = run_distributed(output_of, 1, run_with_a_poisoned_pair, arguments)[0]
    assert code == 0, output
    steps = records(tmp_path / "run")
    assert [record["skipped_steps"] for record in steps] == [0, 1, 1, 1, 1, 1]
    assert all(math.isfinite(record["loss"]) for record in steps if record["step"] != 2)
    assert "step 2 skipped, weights unchanged: the loss of 1 pairs is not finite (pair " in output


@pytest.mark.dist
def test_too_many_skipped_steps_end_the_run(prefix: Path, tmp_path: Path) -> None:
    arguments = flags(prefix, tmp_path / "run", tokens_per_microbatch=5000, split=None, max_skipped_steps=0)
    code, output = run_distributed(output_of, 1, run_with_a_poisoned_pair, arguments)[0]
    assert code == 1
    assert "--max-skipped-steps 0" in output
    assert "Traceback" not in output


@pytest.mark.dist
def test_sft_trains_on_supervised_data(tmp_path: Path) -> None:
    supervised = write_pairs(tmp_path / "data" / "supervised", with_rejected=False)
    pairs = write_pairs(tmp_path / "data" / "pairs")
    for prefix, name in ((supervised, "supervised"), (pairs, "pairs")):
        assert run_distributed(run, 1, flags(prefix, tmp_path / name, objective="sft", train_iters=3)) == [0]
    # What is not trained on must not matter.
    assert losses(tmp_path / "supervised") == losses(tmp_path / "pairs")


@pytest.mark.dist
def test_kto_trains_on_unpaired_rows_at_any_layout(tmp_path: Path) -> None:
    prefix, by_layout = write_unpaired(tmp_path / "data" / "unpaired"), []
    for name, ranks, layout in (
        ("one", 1, {}),
        ("tp", 2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        ("dp", 2, {"tokens_per_microbatch": 900}),
    ):
        arguments = flags(prefix, tmp_path / name, objective="kto", beta=0.5, split="60,20", **layout)
        assert set(run_distributed(run, ranks, arguments)) == {0}
        by_layout.append(losses(tmp_path / name))
        last = records(tmp_path / name, "eval")[-1]
        assert "rewards/margins" not in last
        assert last["rewards/chosen"] > last["rewards/rejected"]
    assert by_layout[0][1] == pytest.approx(0.5, abs=1e-6), "policy and reference are the same at first"
    for other in by_layout[1:]:
        assert other == pytest.approx(by_layout[0], rel=1e-5)


@pytest.mark.dist
def test_unpaired_rows_are_refused_where_two_responses_are_compared(tmp_path: Path) -> None:
    unpaired, pairs = write_unpaired(tmp_path / "unpaired"), write_pairs(tmp_path / "pairs")
    code, output = run_distributed(output_of, 1, run, flags(unpaired, tmp_path / "run", objective="dpo"))[0]
    assert code == 1
    assert "unpaired data, one response with a label a row" in output
    assert "--objective kto" in output
    blend = flags(unpaired, tmp_path / "run", objective="kto", valid_data_path=pairs, split=None)
    code, output = run_distributed(output_of, 1, run, blend)[0]
    assert code == 1
    assert f"{unpaired} holds unpaired rows, {pairs} pairs" in output


@pytest.mark.dist
def test_objectives_train_side_by_side(prefix: Path, tmp_path: Path) -> None:
    for objective in ("simpo", "sft"):
        save = tmp_path / objective
        assert run_distributed(run, 2, flags(prefix, save, objective=objective, tensor_model_parallel_size=2, train_iters=3)) == [
            0,
            0,
        ]
        assert len(losses(save)) == 3


@pytest.mark.dist
def test_without_a_bos_log_p_is_scored_after_what_begins_every_prompt(tmp_path: Path) -> None:
    model_dir = save_byte_bpe(write_hf_model(tmp_path / "model", "qwen2", vocab_size=600, bos_token_id=None), bos=None)
    rows = [
        {"prompt": f"What is {n} plus {n}?", "chosen": f"It is {2 * n}.", "rejected": "No" + " idea" * n} for n in range(1, 8)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prefix = tmp_path / "data" / "pairs"
    inputs = ["--input", str(tmp_path / "pairs.jsonl"), "--tokenizer-model", str(model_dir), "--output-prefix", str(prefix)]
    assert preprocess([*inputs, "--seq-length", "256"]) == 0
    changes = {"load_hf": model_dir, "valid_data_path": prefix, "split": None, "seq_length": 256, "train_iters": 2}
    code, output = run_distributed(output_of, 1, run, flags(prefix, tmp_path / "run", **changes))[0]
    assert code == 0, output
    start = PairStore(prefix)[0].prompt[0]
    assert f"log p(y): each response after <|start_header_id|> (token {start}), which begins every prompt" in output

    model = AutoModelForCausalLM.from_pretrained(model_dir).double().eval()

    def mean_logp(context: np.ndarray, response: np.ndarray) -> float:
        ids = torch.from_numpy(np.concatenate([context, response]))[None]
        with torch.no_grad():
            logps = model(ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
        return float(logps.gather(1, ids[0, len(context) :, None]).mean())

    lines = (tmp_path / "run" / "logs" / "held_out_pairs.first.jsonl").read_text().splitlines()
    for line, pair in zip(lines, PairStore(prefix), strict=True):
        pmi = [mean_logp(pair.prompt, y) - mean_logp(pair.prompt[:1], y) for y in (pair.chosen, pair.rejected)]
        assert json.loads(line)["dpmi"] == pytest.approx(pmi[0] - pmi[1], abs=1e-5)
