"""What a run that goes on must find as it was."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rmipo.config.schema import CheckpointConfig, Config, DataConfig, ObjectiveConfig, TrainingConfig
from megatron_rmipo.data.encoding.context_token import ContextToken
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.pair_store import PairStore
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.objectives.registry import build_objective
from megatron_rmipo.training import resume
from megatron_rmipo.training.data import HeldOutSet, RunData
from megatron_rmipo.training.progress import Progress
from megatron_rmipo.training.resume import StartingPoint, after_restarts, starting_point
from tests.integration.data import write_pairs


class Scene:
    """Data of a run, and its starting points."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.a, self.b = str(write_pairs(folder / "a")), str(write_pairs(folder / "b", first=7))
        self.saved: dict[str, Any] = {}
        self.flags: dict[str, Any] = {}
        monkeypatch.setattr(resume, "saved_flags", lambda source: self.flags)
        self.objective, self.pair_weight = build_objective("simpo", {}), False
        monkeypatch.setattr(resume, "saved_train_state", lambda source: dict(self.saved))

    def start(self, *prefixes: str, weights: list[float] | None = None, split: float = 0.25, held_out: str = "") -> StartingPoint:
        parts = [PairCollection([PairStore(prefix)]) for prefix in prefixes or (self.a,)]
        halves = [part.split(split) for part in parts]
        valid = PairCollection([PairStore(held_out)]) if held_out else PairCollection.combine([last for _, last in halves])
        data = RunData(
            PairCollection.combine([first for first, _ in halves], weights),
            (HeldOutSet("", valid, len(valid)),),
            ContextToken(None, ""),
        )
        objective = self.objective
        config = Config(
            data=DataConfig(data_path=list(prefixes or (self.a,)), split=f"{1 - split},{split}"),
            objective=ObjectiveConfig(
                objective=objective.name, options=dataclasses.asdict(objective.config), pair_weight=self.pair_weight
            ),
        )
        source: Any = SimpleNamespace(directory=Path("run"), iteration=3)
        return starting_point(config, source, data, objective)

    def save(self, start: StartingPoint) -> None:
        self.saved = {**dataclasses.asdict(start.progress), "objective_state": {}}

    def refusal(self, *prefixes: str, **changes: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            self.start(*prefixes, **changes)
        return str(caught.value)


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


def test_other_data_of_as_many_pairs_are_refused_then_and_now(scene: Scene, tmp_path: Path) -> None:
    scene.save(scene.start())
    moved = str(write_pairs(tmp_path / "elsewhere"))
    went_on = scene.start(moved)
    assert (went_on.resumes, went_on.warning) == (True, "")
    assert went_on.progress.data_flags == f"--data-path {moved} --split 0.75,0.25"
    other = str(write_pairs(tmp_path / "other", swap_first=True))
    message = scene.refusal(other)
    assert f"training data was --data-path {scene.a} --split 0.75,0.25 (content " in message
    assert f"is --data-path {other} --split 0.75,0.25 (content " in message
    assert "number of training pairs" not in message
    write_pairs(Path(scene.a), swap_first=True)
    assert "training data was" in scene.refusal(), "under the same name, too"


def test_a_run_goes_on_with_its_frozen_weights_in_the_form_they_had(scene: Scene) -> None:
    scene.save(scene.start())
    scene.flags = {"quantize_base": "nf4"}
    assert "--quantize-base was nf4, is None" in scene.refusal()
    scene.flags = {"quantize_base": None}
    assert scene.start().resumes


def test_a_token_changed_in_place_is_seen(scene: Scene) -> None:
    scene.save(scene.start())
    path = Path(f"{scene.a}.bin")
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    assert "training data was" in scene.refusal()


def test_the_blend_its_order_and_the_split_are_part_of_the_data(scene: Scene) -> None:
    scene.save(scene.start(scene.a, scene.b, weights=[0.5, 0.5]))
    assert scene.start(scene.a, scene.b, weights=[0.5, 0.5]).warning == ""
    assert "training data was" in scene.refusal(scene.b, scene.a, weights=[0.5, 0.5])
    assert "training data was" in scene.refusal(scene.a, scene.b, weights=[0.8, 0.2])
    assert "training data was" in scene.refusal(scene.a, scene.b, weights=[0.5, 0.5], split=0.5)


def test_other_held_out_pairs_are_told_once(scene: Scene) -> None:
    scene.save(scene.start())
    changed = scene.start(held_out=scene.b)
    assert "held-out pairs are not those" in changed.warning
    scene.save(changed)
    assert scene.start(held_out=scene.b).warning == ""


def test_a_checkpoint_of_before_goes_on_and_knows_its_data_from_then(scene: Scene) -> None:
    scene.save(scene.start())
    for name in ("data", "data_flags", "held_out"):
        del scene.saved[name]
    went_on = scene.start(held_out=scene.b)
    assert (went_on.resumes, went_on.warning) == (True, "")
    assert went_on.progress == scene.start(held_out=scene.b).progress
    assert went_on.progress.data


def test_a_run_keeps_the_order_of_pairs_that_it_began_with(scene: Scene) -> None:
    new = scene.start()
    assert new.progress.order == "keyed"
    scene.save(new)
    assert scene.start().progress.order == "keyed"
    # A version that had one order alone kept no name of it.
    del scene.saved["order"]
    went_on = scene.start()
    assert (went_on.resumes, went_on.progress.order) == (True, "")
    scene.saved["order"] = "by_length"
    assert "--load run: order 'by_length': this version knows the orders of pairs" in scene.refusal()


def test_what_a_later_version_says_of_its_run_is_refused(scene: Scene) -> None:
    scene.save(scene.start())
    scene.saved |= {"epoch": 2, "consumed_tokens": 70}
    assert "--load run: it says of its run what this version does not know (consumed_tokens, epoch). Go on" in scene.refusal()


def test_other_settings_of_the_optimizer_are_told(scene: Scene) -> None:
    scene.save(scene.start())
    scene.flags = {"lr": 2e-5, "min_lr": 0.0, "beta": 2.0}
    went_on = scene.start(held_out=scene.b)
    assert went_on.resumes
    assert went_on.warning.startswith(
        "The run goes on with other settings of its optimizer (--lr was 2e-05, is 6e-07). The held-out"
    )
    scene.flags = {"lr": 6e-7}
    assert scene.start().warning == ""


@pytest.mark.parametrize(
    ("name", "options", "changed", "words"),
    [
        ("sft", {}, None, "--pair-weight was False, is True"),
        ("dpo", {}, None, "--pair-weight was False, is True"),
        ("dpo", {}, {"log_ratio_normalization": "mean"}, "--log-ratio-normalization was sum, is mean"),
        ("dpo", {"beta": 0.2}, {"pair_beta": True}, "--beta was 0.2, is None; --pair-beta was False, is True"),
        ("rmipo", {"preset": "paper"}, {}, "--pmi-normalization was sum, is mean; --preset was paper, is per_token"),
        ("dpo:0.8,sft:0.2", {}, {"beta": 0.3}, "--beta was 0.1, is 0.3"),
    ],
)
def test_an_objective_that_is_not_the_same_is_refused_by_options_of_before_and_newer_ones(
    scene: Scene, name: str, options: dict[str, Any], changed: dict[str, Any] | None, words: str
) -> None:
    scene.objective = build_objective(name, options)
    scene.save(scene.start())
    for newer in ("pair_weight", "log_ratio_normalization", "pair_margin", "pair_beta"):
        scene.saved["options"].pop(newer, None)
    assert scene.start().resumes
    if changed is None:
        scene.pair_weight = True
    else:
        scene.objective = build_objective(name, changed)
    assert f"left of it: {words}. Give them as they were, or start a new run" in scene.refusal()


@pytest.mark.parametrize(
    ("lengths", "ends_at"),
    [
        # An epoch of 47 pairs ends with a batch of 5; then by steps, by epochs, and by as many steps as there were.
        ([{"epochs": 1}, {"train_iters": 18}], (18, 107)),
        ([{"epochs": 1}, {"epochs": 3}], (24, 141)),
        ([{"epochs": 1}, {"train_iters": 8}], (8, 47)),
        ([{"train_iters": 5}, {"train_iters": 18}], (18, 108)),
        ([{"epochs": 0.5}, {"epochs": 1}, {"epochs": 0.5}], (8, 47)),
    ],
)
def test_an_extended_run_oversteps_neither_steps_nor_pairs(lengths: list[dict[str, Any]], ends_at: tuple[int, int]) -> None:
    pairs: Any = range(47)
    data, progress = RunData(pairs, (), ContextToken(None, "")), Progress()
    for length in lengths:
        training = TrainingConfig(global_batch_size=6, **length)
        total_pairs, train_iters = data.run_length(training, progress)
        while progress.consumed_pairs < total_pairs:
            progress.step += 1
            progress.consumed_pairs = min(progress.consumed_pairs + 6, total_pairs)
            # Wherever it is stopped, it goes on to the same end.
            assert data.run_length(training, progress) == (total_pairs, train_iters)
        assert progress.step == train_iters
    assert (progress.step, progress.consumed_pairs) == ends_at


def test_ranks_that_are_started_anew_go_on_from_what_the_run_has_saved(tmp_path: Path) -> None:
    save = str(tmp_path / "save")
    begun = Config(checkpoint=CheckpointConfig(load="base", finetune=True, no_load_rng=True, save=save, save_interval=2))
    launched = time.time() - 60
    assert after_restarts(begun, 1, launched) == begun, "nothing is saved yet"
    (tmp_path / "save" / "iter_0000002").mkdir(parents=True)
    assert after_restarts(begun, 0, launched) == begun, "the first start of another run is to be refused"
    assert after_restarts(begun, 2, launched).checkpoint == CheckpointConfig(load=save, save=save, save_interval=2)
    os.utime(tmp_path / "save" / "iter_0000002", (launched - 1, launched - 1))
    assert after_restarts(begun, 2, launched) == begun, "another run's is to be refused again"
    goes_on = Config(checkpoint=CheckpointConfig(load=save, save=save, no_load_rng=True))
    assert after_restarts(goes_on, 1, launched) == goes_on
    assert after_restarts(Config(checkpoint=CheckpointConfig(load="base")), 1, launched).checkpoint.load == "base"
