"""Megatron-LM's ``pretrain`` on preference pairs: the dense answer, our trainer's losses, resume, evaluation, refusals."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rmipo.checkpoint.convert import convert_hf_to_megatron, convert_megatron_to_hf
from megatron_rmipo.data.store.manifest import Manifest, TokenizerInfo
from megatron_rmipo.data.store.pair_store import PairStoreWriter
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.plugin.adapters import megatron_lm
from tests.harness import free_port, run_distributed
from tests.integration.data import MODEL, write_pairs
from tests.integration.problem import BOS, NUM_PAIRS, VOCAB, DenseProblem, make_hf_model, make_pairs
from tests.integration.test_invariance import check
from tests.integration.worlds import Case
from tests.plugin.adapters.pretraining import (
    WITHOUT_CUDA,
    first_gradients,
    model_arguments,
    run_pretraining,
    train_with_trainer,
)
from tests.test_readme import MEGATRON_LM_FLAGS

needs_megatron_lm = pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None, reason="megatron-core here has no megatron.training: 0.19 does"
)
OBJECTIVES = ("rmipo", "simpo", "dpo", "kto")
LAYOUTS = {
    1: [("TP 1", []), ("TP 1, pass before", ["--pass-before-schedule"])],
    2: [
        ("TP 2", ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
        ("PP 2", ["--pipeline-model-parallel-size", "2", "--pass-before-schedule"]),
        ("DP 2", []),
    ],
}
ROOT = Path(__file__).parents[3]
NULL_TOKENIZER = ["--tokenizer-type", "NullTokenizer"]


def write_problem(prefix: Path) -> Path:
    """The pairs of the integration tests as prepared data."""
    with PairStoreWriter(prefix, vocab_size=VOCAB) as writer:
        for pair in make_pairs():
            writer.add(pair)
        writer.finalize(Manifest(tokenizer=TokenizerInfo("none", VOCAB, BOS, 2)))
    return prefix


@pytest.mark.dist
@pytest.mark.slow
@needs_megatron_lm
@pytest.mark.parametrize("world_size", sorted(LAYOUTS))
def test_first_step_is_the_dense_answer(world_size: int, tmp_path: Path) -> None:
    model = make_hf_model(tmp_path / "model")
    convert_hf_to_megatron(model, tmp_path / "megatron")
    problem = DenseProblem(model, model, make_pairs())
    cases = [(name, layout, flags) for layout, flags in LAYOUTS[world_size] for name in OBJECTIVES]
    common = [
        *(*model_arguments(model), *NULL_TOKENIZER, "--train-data-path", str(write_problem(tmp_path / "pairs"))),
        *("--load", str(tmp_path / "megatron"), "--finetune", "--train-iters", "1", "--lr", "1e-3", "--clip-grad", "0"),
        *("--global-batch-size", str(NUM_PAIRS), "--micro-batch-size", "3"),
    ]
    commands = [[*common, "--objective", name, *flags] for name, _, flags in cases]
    results = run_distributed(first_gradients, world_size, commands, str(model))[0]
    for (name, layout, _), result in zip(cases, results, strict=True):
        assert result is not None
        check(Case(f"{layout}, {name}"), result, problem.answer(build_objective(name, {})))


def fixture_arguments(tmp_path: Path, **changes: str | None) -> list[str]:
    """A short run on the parity fixture; a change of None leaves a flag out, an empty one gives it without a value."""
    settings: dict[str, str | None] = {
        **{"tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": str(MODEL), "train-data-path": str(tmp_path / "pairs")},
        **{"load": str(tmp_path / "megatron"), "finetune": "", "train-iters": "10", "lr": "1e-3", "lr-decay-style": "cosine"},
        **{
            "lr-warmup-iters": "2",
            "weight-decay": "0.1",
            "adam-beta2": "0.99",
            "global-batch-size": "6",
            "micro-batch-size": "2",
        },
        **changes,
    }
    given = [(f"--{name}", value) for name, value in settings.items() if value is not None]
    longer = ["--max-position-embeddings", "512", "--seq-length", "512"]
    return [*model_arguments(MODEL), *longer, *(part for pair in given for part in pair if part)]


@pytest.mark.dist
@pytest.mark.slow
@needs_megatron_lm
def test_ten_steps_are_our_trainers_and_checkpoints_go_both_ways(tmp_path: Path) -> None:
    prefix = write_pairs(tmp_path / "pairs")
    convert_hf_to_megatron(MODEL, tmp_path / "megatron")
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    expected = {}
    for name in ("rmipo", "dpo"):
        arguments = [
            *("--load-hf", str(MODEL), "--data-path", str(prefix), "--valid-data-path", str(prefix), "--objective", name),
            *("--train-iters", "10", "--lr", "1e-3", "--lr-warmup-iters", "2", "--weight-decay", "0.1"),
            *("--adam-beta2", "0.99", "--global-batch-size", "6", "--seq-length", "512", "--num-workers", "0"),
            *("--save", str(ours / name)),
        ]
        expected[name] = run_distributed(train_with_trainer, 1, arguments, str(tmp_path / name))[0]
    further = {"valid-data-path": str(prefix), "eval-iters": "8", "save-interval": "10"}
    runs = [fixture_arguments(tmp_path, objective=name, **further, save=str(theirs / name)) for name in expected]
    token_ids = torch.randint(400, (37,), generator=torch.Generator().manual_seed(3))
    *trained, goes_on = run_distributed(run_pretraining, 1, [*runs, ours_there(ours / "rmipo", prefix)], token_ids)[0]
    for (name, (losses, norms, held_out_loss)), run in zip(expected.items(), trained, strict=True):
        assert run.losses == pytest.approx(losses, rel=1e-5)
        assert run.norms == pytest.approx(norms, rel=1e-4)
        assert run.evaluations[-1]["loss"] == pytest.approx(held_out_loss, rel=1e-5)
        convert_megatron_to_hf(theirs / name, tmp_path / f"{name}-hf", assets_dir=MODEL)
        assert hf_logits(tmp_path / f"{name}-hf", token_ids) == pytest.approx(run.logits, abs=1e-4)
        assert (hf_logits(MODEL, token_ids) - run.logits).abs().max() > 0.1
    # Its first step is over the pairs that our trainer held out.
    assert goes_on.losses == pytest.approx([expected["rmipo"][2]], rel=1e-5)


def ours_there(directory: Path, prefix: Path) -> list[str]:
    """A step over all pairs from a checkpoint of our trainer, which says what the model is."""
    return [
        *(*WITHOUT_CUDA, "--use-checkpoint-args", "--load", str(directory), "--finetune", "--norm-epsilon", "1e-5"),
        *("--train-data-path", str(prefix), "--objective", "rmipo", "--train-iters", "1", "--lr", "1e-3"),
        *("--global-batch-size", "48", "--micro-batch-size", "4"),
    ]


def hf_logits(directory: Path, token_ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(token_ids[None]).logits[0]
    return logits


@pytest.mark.dist
@pytest.mark.slow
@needs_megatron_lm
def test_resumed_is_undisturbed(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs")
    convert_hf_to_megatron(MODEL, tmp_path / "megatron")
    # It carries a mean from step to step, and reads a reference.
    common = {"objective": "beta_dpo", "pass-before-schedule": "", "lr-decay-iters": "6", "save-interval": "3"}
    whole, halves = str(tmp_path / "whole"), str(tmp_path / "halves")
    runs = [
        fixture_arguments(tmp_path, **common, **{"save": whole, "train-iters": "6"}),
        fixture_arguments(tmp_path, **common, **{"save": halves, "train-iters": "3"}),
        fixture_arguments(tmp_path, **common, **{"save": halves, "train-iters": "6", "load": halves, "finetune": None}),
    ]
    # Megatron-LM takes the number of steps for a part of the schedule, which goes to 6 in all of them.
    runs[2].append("--override-opt-param-scheduler")
    undisturbed, first, second = (run.losses for run in run_distributed(run_pretraining, 1, runs)[0])
    # The first step of the warm-up moves nothing.
    assert len(set(undisturbed)) == 5
    assert first + second == undisturbed


@pytest.mark.dist
@pytest.mark.slow
@needs_megatron_lm
def test_the_example_runs_under_torchrun(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs")
    convert_hf_to_megatron(MODEL, tmp_path / "megatron")
    further = {"tensor-model-parallel-size": "2", "sequence-parallel": "", "train-iters": "2", "save-interval": "2"}
    # Megatron-LM wants fewer steps of warm-up than of the run.
    further |= {"save": str(tmp_path / "saved"), "lr-warmup-iters": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    script = [
        str(ROOT / "examples/plugins/megatron_lm_pretrain.py"),
        *fixture_arguments(tmp_path, **further),
        "--sequence-parallel",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "rewards/accuracies" in run.stdout
    assert (tmp_path / "saved" / "iter_0000002" / "metadata.json").exists()


def megatron_arguments(**changes: Any) -> SimpleNamespace:
    """What Megatron-LM's parser gives for a run that goes through, as far as it is looked at."""
    return SimpleNamespace(
        **{
            **{"objective": "rmipo", "pair_weight": False, "pass_before_schedule": False, "calculate_per_token_loss": True},
            **{"dataloader_type": "external", "hidden_dropout": 0.0, "attention_dropout": 0.0, "num_experts": None},
            **{"virtual_pipeline_model_parallel_size": None, "pipeline_model_parallel_size": 1, "context_parallel_size": 1},
            **{
                "mtp_num_layers": None,
                "overlap_moe_expert_parallel_comm": False,
                "split": None,
                "moe_token_dispatcher_type": "allgather",
            },
            **{"data_path": None, "train_data_path": ["A"], "valid_data_path": None, "variable_seq_lengths": False},
            **{"eval_iters": 0, "eval_global_batch_size": 8, "full_validation": False, "multiple_validation_sets": False},
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"calculate_per_token_loss": False}, "--calculate-per-token-loss is missing"),
        ({"dataloader_type": "single"}, "--dataloader-type single"),
        ({"hidden_dropout": 0.1}, "--hidden-dropout 0.1: dropout"),
        ({"attention_dropout": 0.1}, "--attention-dropout 0.1: dropout"),
        ({"virtual_pipeline_model_parallel_size": 2}, "--num-layers-per-virtual-pipeline-stage"),
        ({"context_parallel_size": 2}, "--context-parallel-size 2"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers 1"),
        ({"overlap_moe_expert_parallel_comm": True}, "--overlap-moe-expert-parallel-comm"),
        ({"num_experts": 8}, "--moe-token-dispatcher-type allgather, Megatron-LM's default"),
        ({"step_batch_size_schedule": "0:8"}, "--step-batch-size-schedule: the batch is as large at every step"),
        ({"hybrid_context_parallel": True}, "--hybrid-context-parallel does nothing here"),
        ({"eod_mask_loss": True}, "--eod-mask-loss does nothing here"),
        ({"train_data_path": None}, "--train-data-path is missing"),
        ({"mock_data": True}, "--mock-data: pairs are those of --train-data-path"),
        ({"sft": True}, "--sft: pairs are those of --train-data-path"),
        ({"split": "99,1,0"}, "--split 99,1,0: held-out pairs are those of --valid-data-path"),
        ({"multiple_validation_sets": True}, "--multiple-validation-sets"),
        ({"eval_iters": 100}, "--eval-iters 100: there are no held-out pairs"),
        ({"full_validation": True}, "--full-validation ends Megatron-LM"),
        ({"valid_data_path": ["B"]}, "--valid-data-path does nothing: give --eval-iters N for N x 8 pairs"),
        ({"objective": "epsilon_dpo"}, "--objective epsilon_dpo keeps its reference in memory"),
        ({"objective": "beta_dpo"}, "--objective beta_dpo carries numbers from step to step"),
        ({"objective": "kto", "pipeline_model_parallel_size": 2}, "--objective kto reads log-probs of the whole batch"),
        ({"objective": "dpo", "gamma_beta_ratio": "0.5"}, "--objective dpo has no such option"),
    ],
)
def test_what_cannot_work_is_told_by_name(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        megatron_lm.PreferenceTraining(megatron_arguments(**changes))
    assert told in str(caught.value)


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        megatron_lm.PreferenceTraining(megatron_arguments(hidden_dropout=0.1, split="99,1,0", eval_iters=100))
    assert len(str(caught.value).splitlines()) == 4


def test_rows_may_differ_in_length_between_pipeline_stages() -> None:
    args = megatron_arguments(pipeline_model_parallel_size=2)
    megatron_lm.PreferenceTraining(args)
    assert args.variable_seq_lengths
    assert args.moe_token_dispatcher_type == "alltoall"


def test_flags_stand_beside_another_parsers(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--objective", "dpo:0.8,sft:0.2", "--beta", "0.3", "--tokens-per-microbatch", "77", "--pair-weight"]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("hidden-dropout", "attention-dropout"):
        parser.add_argument(f"--{name}", type=float, default=0.1)
    args = megatron_lm.add_arguments(parser).parse_args(words)
    assert (args.hidden_dropout, args.calculate_per_token_loss, args.tokens_per_microbatch) == (0.0, True, 77)
    training = megatron_lm.PreferenceTraining(megatron_arguments(**vars(args)))
    assert training.objective.config.beta == 0.3
    assert training.objective.needs.columns == ("weight",)


@needs_megatron_lm
def test_the_page_names_flags_that_megatron_lm_has() -> None:
    arguments = importlib.import_module("megatron.training.arguments")
    parser = megatron_lm.add_arguments(arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    assert set(parser._option_string_actions) >= MEGATRON_LM_FLAGS


def test_an_option_that_is_a_flag_of_the_other_program_is_refused() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--rl-kl-beta", dest="beta")
    with pytest.raises(ConfigError, match="--beta: an option of the objective is a flag of this program"):
        megatron_lm.add_arguments(parser)


def test_a_run_goes_on_in_the_order_of_its_checkpoint() -> None:
    def order(given: str | None, iteration: int, saved: Any) -> str:
        args = megatron_arguments(pair_order=given, iteration=iteration, load="saved")
        return megatron_lm.PreferenceTraining(args)._order(saved)

    assert order(None, 0, None) == "keyed"
    assert order(None, 7, SimpleNamespace(pair_order="keyed")) == "keyed"
    # Written before there was another.
    assert order(None, 7, SimpleNamespace()) == "permuted"
    assert order("permuted", 0, None) == order("permuted", 7, None) == "permuted"
    with pytest.raises(ConfigError, match=r"--load saved: iteration 7 does not tell .* --pair-order keyed, or permuted where"):
        order(None, 7, None)


def test_data_before_a_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="no model was attached"):
        megatron_lm.PreferenceTraining(megatron_arguments()).datasets([8, 0, 0])
