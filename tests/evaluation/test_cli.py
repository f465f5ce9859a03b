"""tools/evaluate_pairs.py: each criterion against transformers in float64, over ranks; adapters, kept scores, comparisons."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rmipo import command as command_module
from megatron_rmipo.command import DONE, FAULT_OF_USER
from megatron_rmipo.config.schema import ModelConfig
from megatron_rmipo.data.preparing import preprocess_cli
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.evaluation import cli
from megatron_rmipo.evaluation.cli import EvaluationConfig, plan_of
from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.objectives.registry import build_objective
from tests.checkpoint.adapters import loaded, make_adapter
from tests.evaluation import miniatures
from tests.evaluation.miniatures import write_lines, write_model
from tests.harness import run_distributed
from tests.integration.test_training import output_of


def run_all(commands: list[list[str]]) -> list[tuple[int, str]]:
    """Exit code and output of each command, one after the other on the same rank, with the progress of what is soon done."""
    command_module._SECONDS_BETWEEN_LINES = 0.0
    return [output_of(cli.main, command) for command in commands]


class Dense:
    """A Hugging Face model in float64, that scores one response at a time."""

    def __init__(self, directory: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager")
        if weights is not None:
            self.model.load_state_dict({name: tensor.double() for name, tensor in weights.items()})

    @torch.no_grad()
    def score(self, prompt: str | None, answer: str, *, from_bos: bool = True) -> tuple[float, int]:
        """(sum of log-probs, scored tokens) of an answer to a question, or of the answer alone."""
        messages = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before = self.tokenizer.encode(text, add_special_tokens=False)
        if prompt is None:
            before = [self.tokenizer.bos_token_id] if from_bos else []
        own = self.tokenizer.encode(f"{answer.strip()}<|eot_id|>", add_special_tokens=False)
        ids = torch.tensor([before + own])
        logps = self.model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        scored = logps[max(len(before) - 1, 0) :]
        return float(scored.sum()), len(scored)


def answers_of(line: dict[str, Any]) -> tuple[str, str, str]:
    """Prompt and the two answers of a line of --pairs."""
    row = {"rb": miniatures.rewardbench, "rb2": miniatures.rewardbench2, "rm": miniatures.rm_bench}[line["set"]]()[line["row"]]
    good, bad = line["answers"]
    pick = lambda given, number: given[number] if isinstance(given, list) else given  # noqa: E731
    return row["prompt"], pick(row["chosen"], good), pick(row["rejected"], bad)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scored(model: Dense, line: dict[str, Any], *, alone: bool = False, from_bos: bool = True) -> Iterator[tuple[float, int]]:
    prompt, *answers = answers_of(line)
    return (model.score(None if alone else prompt, answer, from_bos=from_bos) for answer in answers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, raw sets, a prepared one."""
    folder = tmp_path_factory.mktemp("evaluation")
    for name, seed in (("model", 0), ("other", 1)):
        write_model(folder / name, seed=seed)
    write_lines(folder / "rb.jsonl", miniatures.rewardbench())
    write_lines(folder / "rb2.jsonl", miniatures.rewardbench2())
    (folder / "rm.json").write_text(json.dumps(miniatures.rm_bench()))
    write_lines(folder / "llmbar.jsonl", miniatures.llmbar())
    flags = {"--input": "llmbar.jsonl", "--tokenizer-model": "model", "--output-prefix": "llmbar"}
    assert preprocess_cli.main([word for flag, name in flags.items() for word in (flag, str(folder / name))]) == DONE
    return folder


def flags_of(folder: Path, cache: str, *sets: str) -> list[str]:
    return ["--load-hf", str(folder / "model"), "--cache", str(folder / cache), "--data", *sets]


@pytest.mark.dist
def test_every_criterion_is_what_transformers_computes_in_float64(folder: Path) -> None:
    sets = [f"rb={folder / 'rb.jsonl'}", f"rb2={folder / 'rb2.jsonl'}", f"rm={folder / 'rm.json'}", f"bar={folder / 'llmbar'}"]
    command = [
        *flags_of(folder, "two-ranks", *sets),
        "--reference-hf",
        str(folder / "other"),
        "--objective",
        "dpo",
        "--beta",
        "0.3",
    ]
    files = ["--output", str(folder / "two" / "results.json"), "--pairs", str(folder / "pairs.jsonl")]
    layout = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--tokens-per-microbatch", "150"]
    ((code, output),), ((other_code, other_output),) = run_distributed(run_all, 2, [[*command, *files, *layout]])
    assert (code, other_code) == (DONE, DONE), output + other_output
    model, reference = Dense(folder / "model"), Dense(folder / "other")
    lines = lines_of(folder / "pairs.jsonl")
    assert [sum(line["set"] == name for line in lines) for name in ("rb", "rb2", "rm", "bar")] == [5, 15 + 3 + 4, 15, 5]
    for line in lines[:5] + lines[17:32]:
        after, alone = [list(scored(model, line, alone=alone)) for alone in (False, True)]
        ratios = [mine[0] - theirs[0] for mine, theirs in zip(after, scored(reference, line), strict=True)]
        assert line["tokens"] == [count for _, count in after]
        expected = {
            "mean_logp": [total / count for total, count in after],
            "sum_logp": [total for total, _ in after],
            "pmi_mean": [(one - two) / count for (one, count), (two, _) in zip(after, alone, strict=True)],
            "pmi_sum": [one - two for (one, _), (two, _) in zip(after, alone, strict=True)],
            "log_ratio": ratios,
            "reward": [0.3 * ratio for ratio in ratios],
        }
        assert line["scores"].keys() == expected.keys()
        for name, values in expected.items():
            assert line["scores"][name] == pytest.approx(values, abs=2e-4), name
    results = json.loads((folder / "two" / "results.json").read_text())
    assert (results["kind"], results["model"]) == ("evaluate_pairs", str(folder / "model"))
    titles = {table["title"]: table for table in results["tables"]}
    rows = titles["rb: accuracy, with the bounds of 95 % of resampled questions"]["rows"]
    margins = np.array([line["scores"]["sum_logp"] for line in lines[:5]]) @ [1, -1]
    assert next(row for row in rows if row[0] == "all" and row[2] == "sum_logp")[3] == pytest.approx((margins > 0).mean())
    assert {row[0] for row in rows} == {"all", "alpacaeval-easy", "hep-cpp", "xstest-should-refuse", "math-prm"}
    # The loss of DPO is that of a logit.
    bias = titles["rb: length bias and calibration"]["rows"]
    assert [row[0] for row in bias if row[-1] is not None] == ["reward"]
    reported = {name: its["benchmark"] for name, its in results["details"]["sets"].items()}
    assert reported["rb"]["reward"].keys() == {"Chat", "Safety", "Reasoning", "RewardBench score"}
    assert reported["rb2"]["reward"].keys() == {"Math", "Focus", "Ties", "RewardBench 2 score"}
    assert "RM-Bench score" in reported["rm"]["sum_logp"]
    assert reported["bar"] == {}
    for name in titles:
        assert ("tenths" in name) != (name in output + other_output)


@pytest.mark.dist
def test_adapters_kept_scores_other_objectives_and_comparisons(folder: Path) -> None:
    adapter = make_adapter(folder / "adapter", folder / "model")
    merged = loaded(folder / "model", adapter, torch.float32).merge_and_unload().state_dict()
    sets = flags_of(folder, "cache", f"rb={folder / 'rb.jsonl'}")
    first, again, kto = (folder / name for name in ("first.jsonl", "again.jsonl", "kto.jsonl"))
    mine = ["--load-hf", str(adapter), *sets[2:], "--objective", "rmipo", "--preset", "official"]
    reference = ["--reference-hf", str(folder / "model"), "--by", "reward", "--objective", "kto", "--beta", "0.7"]
    commands = [
        [*sets, "--pairs", str(first)],
        [*sets, "--pairs", str(again)],
        [*mine, "--pairs", str(folder / "adapted.jsonl"), "--compare", str(first), "--output", str(folder / "adapted.json")],
        ["--load-hf", str(adapter), *sets[2:], *reference, "--pairs", str(kto)],
        [*mine, "--compare", str(folder / "rb.jsonl")],
        [*sets, "--seq-length", "9"],
    ]
    (found,) = run_distributed(run_all, 1, commands)
    assert [code for code, _ in found] == [DONE] * 4 + [FAULT_OF_USER] * 2, found
    assert "matched log-probs of rb: " in found[0][1]
    assert "log-probs of" not in found[1][1], "what is kept is computed again"
    assert lines_of(first) == lines_of(again)
    dense, plain = Dense(folder / "model", merged), Dense(folder / "model")
    for line, ratio in zip(lines_of(folder / "adapted.jsonl"), lines_of(kto), strict=True):
        after = list(scored(dense, line))
        assert line["scores"]["sum_logp"] == pytest.approx([total for total, _ in after], abs=2e-4)
        # The official preset of RMiPO scores responses alone without a context; its rewards are means times beta.
        assert line["scores"]["reward"] == pytest.approx([2 * total / count for total, count in after], abs=2e-4)
        ratios = [one - two for (one, _), (two, _) in zip(after, scored(plain, line), strict=True)]
        assert ratio["scores"] == {"reward": pytest.approx([0.7 * one for one in ratios], abs=2e-4)}
    kinds = {path.name.rpartition("-")[0] for path in (folder / "cache").iterdir()}
    assert {"matched", "mismatched", "alone"} < kinds
    compared = json.loads((folder / "adapted.json").read_text())["details"]["compared"]["rb"]
    assert compared.keys() == {"mean_logp", "sum_logp", "pmi_mean", "pmi_sum"}
    own, other = (
        np.array([line["scores"]["sum_logp"] for line in lines_of(path)]) @ [1, -1] for path in (folder / "adapted.jsonl", first)
    )
    assert compared["sum_logp"]["first_alone"] == int(((own > 0) & (other <= 0)).sum())
    assert f"--compare {folder / 'rb.jsonl'}: line 1 is none that --pairs writes" in found[4][1]
    assert f"--data rb={folder / 'rb.jsonl'}: none of its 5 pairs can be used" in found[5][1]
    assert list((folder / "cache").glob("sets-*")) == []


FILES = ["a=a.jsonl"]


@pytest.mark.parametrize(
    ("flags", "model", "objective", "said"),
    [
        ({"data": []}, {}, None, "nothing to evaluate"),
        ({"data": ["a=x", "a=y"]}, {}, None, "two sets have that name"),
        ({"by": ["mean"]}, {}, None, "--by mean: unknown; known: mean_logp"),
        ({"by": ["log_ratio"]}, {}, None, "--by log_ratio needs a reference"),
        ({"by": ["reward"]}, {}, None, "--by reward needs --objective NAME"),
        ({}, {}, "dpo", "--objective dpo needs a reference"),
        ({}, {"reference_hf": "m"}, "epsilon_dpo", "rank as --by log_ratio does"),
        ({"by": ["sum_logp"]}, {}, "simpo", "--objective simpo does nothing"),
        ({"by": ["sum_logp"]}, {"reference_hf": "m"}, None, "the reference does nothing"),
        ({}, {"reference_hf": "m", "reference_load": "n"}, None, "both name the reference"),
        ({"bootstrap_samples": 0}, {}, None, "--bootstrap-samples must be at least 1"),
        ({"seq_length": 2}, {}, None, "--seq-length 2"),
    ],
)
def test_what_cannot_be_or_does_nothing_is_refused(
    flags: dict[str, Any], model: dict[str, str], objective: str | None, said: str
) -> None:
    built: Objective | None = None if objective is None else build_objective(objective, {})
    with pytest.raises(ConfigError) as caught:
        plan_of(EvaluationConfig(**{"data": FILES, **flags}), ModelConfig(**model), built)
    assert said in str(caught.value)


def test_without_by_all_that_the_models_allow_is_ranked_by() -> None:
    def names(model: ModelConfig, objective: str | None = None) -> tuple[str, ...]:
        built = None if objective is None else build_objective(objective, {})
        return plan_of(EvaluationConfig(data=FILES), model, built).wanted.names

    free = ("mean_logp", "sum_logp", "pmi_mean", "pmi_sum")
    assert names(ModelConfig()) == free
    assert names(ModelConfig(), "simpo") == (*free, "reward")
    assert names(ModelConfig(reference_load="m"), "dpo") == (*free, "log_ratio", "reward")


def test_options_of_objectives_are_flags_as_in_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--data", "a=a.jsonl", "--beta", "2"]) == FAULT_OF_USER
    assert "--beta does nothing without --objective NAME" in capsys.readouterr().err
    assert cli.main(["--data", "a=a.jsonl", "--objective", "simpo", "--gamma-max", "2"]) == FAULT_OF_USER
    assert "--objective simpo has no such option" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--subset-column", "--reference-load", "--gamma-max", "--tensor-model-parallel-size"))
