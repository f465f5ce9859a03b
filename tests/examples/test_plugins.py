"""The examples that put an objective into other programs run, with stand-ins for those programs."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.plugin.adapters.nemo_rl import ObjectiveBatches, ObjectiveLoss
from tests.examples.scripts import ROOT
from tests.integration.data import FIXTURE, write_pairs
from tests.parity.replay import read_pairs


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "plugins" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nemo_rl_is_called_once_and_put_in(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    nemo_rl = example("nemo_rl_loss")
    # The example puts a stand-in here; afterwards nothing is there again.
    monkeypatch.setitem(sys.modules, "nemo_rl.algorithms.loss.interfaces", None)
    monkeypatch.setattr(sys, "argv", ["nemo_rl_loss.py", "--objective", "kto"])
    nemo_rl.main()
    assert capsys.readouterr().out.startswith("kto: loss 0.")
    dpo: Any = types.SimpleNamespace(add_ref_logprobs_to_data=print)
    nemo_rl.put_in(dpo, build_objective("rmipo", {}), 7)
    # As its setup() does.
    loss = dpo.DPOLossFn(object(), use_fused_linear_logprobs=True)
    assert isinstance(loss, ObjectiveLoss)
    assert loss.use_fused_linear_logprobs
    assert isinstance(dpo.add_ref_logprobs_to_data, ObjectiveBatches)


def test_slime_is_called_once_and_gets_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slime = example("slime_loss")
    slime.main()
    assert capsys.readouterr().out.startswith("rmipo: sums of 2 pairs: loss ")

    @dataclasses.dataclass
    class Sample:
        tokens: list[int]
        response_length: int
        loss_mask: list[int]
        rollout_id: int
        index: int
        reward: float
        status: str
        Status = types.SimpleNamespace(COMPLETED="completed")

    stand_in: Any = types.ModuleType("slime.utils.types")
    stand_in.Sample = Sample
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    monkeypatch.setenv("RMIPO_PAIRS", str(write_pairs(tmp_path / "pairs")))
    groups = slime.generate_rollout(types.SimpleNamespace(rollout_batch_size=20), 2, None)
    samples = [sample for group in groups for sample in group]
    assert [sample.index for sample in samples] == list(range(160, 240))
    assert [sample.rollout_id for sample in samples[::4]] == list(range(40, 60))
    # The data set's 48 pairs begin anew.
    pair = next(iter(read_pairs(FIXTURE)))
    assert samples[32].tokens == [*pair.prompt.tolist(), *pair.chosen.tolist()]
    assert samples[35].tokens == [slime.CONTEXT_TOKEN_ID, *pair.rejected.tolist()]


@pytest.mark.slow
def test_trl_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    arguments = ["--objective", "simpo", "--steps", "2", "--output", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["trl_trainer.py", *arguments])
    trainers: list[Any] = []
    trl = example("trl_trainer")
    train = trl.RmipoTrainer.train
    monkeypatch.setattr(trl.RmipoTrainer, "train", lambda self: (trainers.append(self), train(self)))
    trl.main()
    (trainer,) = trainers
    assert [entry["step"] for entry in trainer.state.log_history if "rewards/margins" in entry] == [1, 2]
    assert trainer.ref_model is None
