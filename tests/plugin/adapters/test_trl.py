"""With TRL's own DPOTrainer; skipped where trl is not installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rmipo.data.store.pair_store import TokenizedPair
from megatron_rmipo.embedded.generate import make_inputs
from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.plugin.adapters.trl import ObjectiveTrainer
from tests.integration.problem import DenseProblem, values_beside

trl = pytest.importorskip("trl")

NUM_PAIRS = 10


class Trainer(ObjectiveTrainer, trl.DPOTrainer):  # type: ignore[name-defined, misc]
    pass


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trl") / "inputs"
    make_inputs(directory, seed=1, num_supervised=1, num_train=NUM_PAIRS, num_held_out=1)
    return directory


def trainer_of(inputs: Path, output: Path, name: str, options: dict[str, Any] | None = None, **given: Any) -> Any:
    """A trainer whose step is all pairs, in micro-batches of 4, 4 and 2."""
    model, reference = (AutoModelForCausalLM.from_pretrained(inputs / "model", dtype="float32") for _ in range(2))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.9)
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    tokenizer.pad_token = tokenizer.eos_token
    rows = [json.loads(line) for line in (inputs / "train.jsonl").read_text().splitlines()]
    beside = values_beside(len(rows)).tolist()
    rows = [{**row, "beta": beta, "margin": margin} for row, (beta, margin, _) in zip(rows, beside, strict=True)]
    settings = {
        "output_dir": str(output),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": True,
        # In the data's order, which says whose responses a prompt of kto's gets.
        "train_sampling_strategy": "sequential",
    }
    further = {name: given.pop(name) for name in ("context_token_id", "callbacks") if name in given}
    return Trainer(
        model=model,
        ref_model=reference,
        objective=build_objective(name, options or {}),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        args=trl.DPOConfig(**{**settings, **given}),
        **further,
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rmipo", {}),
        ("simpo", {}),
        ("dpo", {"pair_beta": True, "pair_margin": True}),
        ("kto", {}),
        ("sft", {}),
        ("epsilon_dpo", {}),
    ],
)
def test_the_first_step_is_as_in_float64(name: str, options: dict[str, Any], inputs: Path, tmp_path: Path) -> None:
    trainer = trainer_of(inputs, tmp_path / "run", name, options)
    has_reference = name in ("dpo", "kto", "epsilon_dpo")
    assert (trainer.ref_model is not None) == has_reference
    if has_reference:
        trainer.ref_model.save_pretrained(tmp_path / "reference")
    rows = [
        TokenizedPair(*(np.array(row[field], dtype=np.int64) for field in ("prompt_ids", "chosen_ids", "rejected_ids")))
        for row in trainer.train_dataset
    ]
    trainer.train()
    (first, *_) = trainer.state.log_history
    dense = DenseProblem(inputs / "model", tmp_path / "reference" if has_reference else inputs / "model", rows)
    loss, gradients, metrics = dense.answer(build_objective(name, options))
    assert first["loss"] == pytest.approx(loss, rel=1e-5)
    assert first["grad_norm"] == pytest.approx(float(torch.stack([g.norm() for g in gradients.values()]).norm()), rel=1e-4)
    for metric, values in metrics.items():
        assert first[metric] == pytest.approx(float(values.double().mean()), rel=1e-4, abs=1e-5), metric


def test_a_state_goes_on_where_the_checkpoint_left_it(inputs: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "restore_callback_states_from_checkpoint": True}
    settings["lr_scheduler_type"] = "constant"
    whole = trainer_of(inputs, tmp_path / "whole", "beta_dpo", **settings)
    whole.train()
    assert whole._holder.values != build_objective("beta_dpo", {}).initial_state()
    resumed = trainer_of(inputs, tmp_path / "whole", "beta_dpo", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed._holder.values == pytest.approx(whole._holder.values, rel=1e-6)
    for ours, theirs in zip(resumed.state.log_history[-3:-1], whole.state.log_history[-3:-1], strict=True):
        assert (ours["step"], ours["loss"]) == (theirs["step"], pytest.approx(theirs["loss"], rel=1e-6))
    forgetful = trainer_of(
        inputs, tmp_path / "whole", "beta_dpo", **{**settings, "restore_callback_states_from_checkpoint": False}
    )
    with pytest.raises(ConfigError, match=r"beta_dpo carries .* restore_callback_states_from_checkpoint=True"):
        forgetful.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def test_evaluation_and_reference_sums_computed_beforehand(inputs: Path, tmp_path: Path) -> None:
    expected = trainer_of(inputs, tmp_path / "run", "dpo", per_device_eval_batch_size=10)
    before = expected.evaluate(expected.train_dataset)
    kept = trainer_of(inputs, tmp_path / "run", "dpo", precompute_ref_log_probs=True)
    kept.train()
    assert before["eval_loss"] == pytest.approx(kept.state.log_history[0]["loss"], rel=1e-5)
    assert expected.state.log_history[-1]["eval_rewards/margins"] == pytest.approx(
        kept.state.log_history[0]["rewards/margins"], rel=1e-3
    )
    with pytest.raises(ConfigError, match="call evaluate, not predict"):
        expected.predict(expected.train_dataset)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beta": 2.0}, r"DPOConfig\(beta=2.0\) would do nothing: objective simpo has options of its own"),
        ({"loss_type": "ipo"}, r"DPOConfig\(loss_type=\['ipo'\]\) would do nothing"),
        ({"ld_alpha": 0.5}, "ld_alpha=0.5"),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(given: dict[str, Any], message: str, inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer_of(inputs, tmp_path, "simpo", **given)


def test_a_tokenizer_without_bos_asks_for_the_context(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = AutoTokenizer.from_pretrained

    def without_bos(path: Any) -> Any:
        tokenizer = load(path)
        tokenizer.bos_token = None
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", without_bos)
    with pytest.raises(ConfigError, match="objective rmipo scores each response after a BOS token, and the tokenizer has none"):
        trainer_of(inputs, tmp_path, "rmipo")
    assert trainer_of(inputs, tmp_path, "rmipo", context_token_id=7)._loss.context_token_id == 7
    assert trainer_of(inputs, tmp_path, "simpo")._loss.context_token_id is None


def test_a_row_without_the_column_is_named(inputs: Path, tmp_path: Path) -> None:
    trainer = trainer_of(inputs, tmp_path, "dpo", {"pair_margin": True})
    trainer.train_dataset = trainer.train_dataset.remove_columns("margin")
    with pytest.raises(DataError, match="no number 'margin'"):
        trainer.train()
