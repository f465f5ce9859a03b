"""What bad input gets: one screen that names the file or flag, the value and the remedy, before any training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from megatron_rmipo.checkpoint.convert import convert_hf_to_megatron
from megatron_rmipo.training import main as trainer
from tests.harness import run_distributed
from tests.integration.data import MODEL, write_pairs
from tests.integration.test_training import flags


class Scene:
    """A run that would work, to be spoilt in one way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        shutil.copytree(MODEL, self.model)
        for path in [self.model, *self.model.iterdir()]:
            path.chmod(0o755)
        self.prefix = write_pairs(folder / "pairs")
        self.save = folder / "run"
        self.changes: dict[str, Any] = {"load_hf": self.model}

    def change_config(self, **fields: Any) -> None:
        path = self.model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    def arguments(self) -> list[str]:
        return flags(self.prefix, self.save, **self.changes)


def truncate_weights(scene: Scene) -> None:
    path = scene.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def remove_weights(scene: Scene) -> None:
    (scene.model / "model.safetensors").unlink()


def use_unknown_architecture(scene: Scene) -> None:
    scene.change_config(architectures=["CohereForCausalLM"], model_type="mamba")


def cut_heads_in_three(scene: Scene) -> None:
    scene.changes["tensor_model_parallel_size"] = 3


def cut_layers_in_three(scene: Scene) -> None:
    scene.changes["pipeline_model_parallel_size"] = 3


def change_vocabulary(scene: Scene) -> None:
    path = scene.model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    # Two pieces trade places: the size is right, the ids are not.
    if isinstance(vocabulary, list):
        vocabulary[300], vocabulary[301] = vocabulary[301], vocabulary[300]
    else:
        names = sorted(vocabulary, key=vocabulary.get)
        vocabulary[names[300]], vocabulary[names[301]] = vocabulary[names[301]], vocabulary[names[300]]
    path.write_text(json.dumps(tokenizer))
    (scene.model / "tokenizer.model").unlink(missing_ok=True)


def shrink_config_vocabulary(scene: Scene) -> None:
    scene.change_config(vocab_size=390)


def shrink_model_vocabulary(scene: Scene) -> None:
    path = scene.model / "model.safetensors"
    cut = {"model.embed_tokens.weight", "lm_head.weight"}
    save_file({name: tensor[:390].clone() if name in cut else tensor for name, tensor in load_file(path).items()}, path)
    scene.change_config(vocab_size=390)


def remove_bin(scene: Scene) -> None:
    Path(f"{scene.prefix}.bin").unlink()


def name_missing_data(scene: Scene) -> None:
    scene.prefix = scene.folder / "elsewhere"


def train_preferences_on_supervised_data(scene: Scene) -> None:
    scene.prefix = write_pairs(scene.folder / "supervised", with_rejected=False)


def hold_out_everything(scene: Scene) -> None:
    scene.changes["split"] = "1,99"


def mistype_a_flag(scene: Scene) -> None:
    scene.changes["gama_min"] = 0.5


def give_an_option_of_another_objective(scene: Scene) -> None:
    scene.changes.update(objective="simpo", gamma_min=0.5)


def shorten_sequences(scene: Scene) -> None:
    scene.changes["seq_length"] = 100


def starve_the_packs(scene: Scene) -> None:
    scene.changes.update(seq_length=300, tokens_per_microbatch=300)


def leave_half_a_checkpoint(scene: Scene) -> None:
    partial = scene.folder / "half" / "iter_0000010"
    partial.mkdir(parents=True)
    (partial / "metadata.json").write_text("{}")
    (scene.folder / "half" / "latest_checkpointed_iteration.txt").write_text("10")
    scene.changes.update(load=scene.folder / "half", load_hf=None)


def export_over_other_files(scene: Scene) -> None:
    target = scene.folder / "mine"
    target.mkdir()
    (target / "thesis.tex").write_text("precious")
    scene.changes["save_hf"] = target


def save_into_another_run(scene: Scene) -> None:
    iteration = scene.save / "iter_0000003"
    iteration.mkdir(parents=True)
    (iteration / "metadata.json").write_text("{}")
    (scene.save / "latest_checkpointed_iteration.txt").write_text("3")


def go_on_with_another_programs_checkpoint(scene: Scene) -> None:
    convert_hf_to_megatron(scene.model, scene.save)
    (scene.save / "release").rename(scene.save / "iter_0000003")
    (scene.save / "iter_0000003" / "rmipo.json").unlink()
    (scene.save / "latest_checkpointed_iteration.txt").write_text("3")
    scene.changes["load"] = scene.save


def use_a_file_as_directory(scene: Scene) -> None:
    (scene.folder / "file").write_text("")
    scene.save = scene.folder / "file"


def start_from_nothing(scene: Scene) -> None:
    scene.changes["load_hf"] = None


CASES: list[tuple[Callable[[Scene], None], list[str]]] = [
    (truncate_weights, ["ConversionError", "model.safetensors", "truncated"]),
    (remove_weights, ["ConversionError", "safetensors"]),
    (use_unknown_architecture, ["ConversionError", "CohereForCausalLM", "LlamaForCausalLM", "MistralForCausalLM"]),
    (cut_heads_in_three, ["ConfigError", "--tensor-model-parallel-size 3", "8 attention heads", "1, 2, 4"]),
    (cut_layers_in_three, ["ConfigError", "--pipeline-model-parallel-size 3", "4 layers", "1, 2, 4"]),
    (change_vocabulary, ["DataError", "another tokenizer", "preprocess_preferences.py"]),
    (shrink_config_vocabulary, ["ConversionError", "model.safetensors", "[400, 64]", "config.json"]),
    (shrink_model_vocabulary, ["DataError", "ids up to 399", "vocab_size 390"]),
    (remove_bin, ["DataError", "pairs.bin", "missing"]),
    (name_missing_data, ["DataError", "elsewhere"]),
    (train_preferences_on_supervised_data, ["DataError", "supervised", "--objective rmipo", "--objective sft"]),
    (hold_out_everything, ["DataError", "--split 1,99", "--valid-data-path"]),
    (mistype_a_flag, ["ConfigError", "--gama-min", "--gamma-min"]),
    (give_an_option_of_another_objective, ["ConfigError", "gamma", "simpo", "gamma"]),
    (shorten_sequences, ["ConfigError", "--seq-length 100", "tokens long"]),
    (starve_the_packs, ["ConfigError", "--tokens-per-microbatch 300", "or more"]),
    (leave_half_a_checkpoint, ["Error", "half", "complete"]),
    (export_over_other_files, ["Error", "--save-hf", "mine", "thesis.tex"]),
    (save_into_another_run, ["ConfigError", "--save", "--load"]),
    (go_on_with_another_programs_checkpoint, ["ConfigError", "iter_0000003 was written by another", "--finetune", "--save"]),
    (use_a_file_as_directory, ["Error", "file"]),
    (start_from_nothing, ["ConfigError", "--load-hf"]),
]


@pytest.mark.parametrize(("spoil", "words"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_refused_in_one_screen_before_training(
    spoil: Callable[[Scene], None], words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    scene = Scene(tmp_path)
    spoil(scene)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    assert trainer.main(scene.arguments()) == 1
    message = capfd.readouterr().err
    for word in words:
        assert word in message, message
    assert "Traceback" not in message
    assert len(message.splitlines()) <= 24
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before, "a refused run must leave no files"


def test_an_unspoilt_scene_is_not_refused(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.changes.update(train_iters=1, lr_warmup_iters=None, split=None)
    assert run_distributed(trainer.main, 1, scene.arguments()) == [0]


def test_traceback_on_request(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    scene = Scene(tmp_path)
    remove_weights(scene)
    assert trainer.main([*scene.arguments(), "--debug"]) == 1
    assert "Traceback" in capfd.readouterr().err


def test_lengths_are_those_the_cases_assume() -> None:
    from tests.parity.replay import read_pairs

    pairs = read_pairs(MODEL.parent)
    assert 100 < max(p.prompt.size + max(p.chosen.size, p.rejected.size) for p in pairs) <= 300
    assert max(np.sum([p.prompt.size, p.chosen.size, p.rejected.size]) for p in pairs) > 302
