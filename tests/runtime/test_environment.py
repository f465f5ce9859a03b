import importlib.util
import logging
from pathlib import Path

import pytest
import torch

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.runtime.environment import check_environment, costs_of_missing_kernels, hide_deprecation_banners


def _make_package(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").write_text("raise ImportError('must not be imported')\n")


def test_an_environment_without_apex_passes() -> None:
    check_environment()


def test_a_wrong_apex_is_recognised_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make_package(tmp_path, "apex", "apex/lib")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"apex.*not NVIDIA's.*pip uninstall apex"):
        check_environment()


def test_a_wrong_apex_of_one_file_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="apex"):
        check_environment()


def test_nvidias_apex_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make_package(tmp_path, "apex", "apex/optimizers", "apex/multi_tensor_apply")
    monkeypatch.syspath_prepend(tmp_path)
    check_environment()


@pytest.mark.parametrize("name", ["psutil", "wandb", "mlflow"])
def test_what_is_missing_is_named_with_its_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == name else real(wanted))
    with pytest.raises(ConfigError, match=rf"{name}.*pip install"):
        check_environment({name: f"--{name}"})


def test_wandb_is_not_needed_where_it_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == "wandb" else real(wanted))
    check_environment()


@pytest.mark.parametrize(
    ("installed", "costs"),
    [
        (
            (),
            [
                "Adam takes temporaries of 4 bytes a parameter",
                "rotary embeddings are not one kernel",
                "not summed in their buffer",
            ],
        ),
        (("transformer_engine",), ["not summed in their buffer"]),
        (("apex",), ["rotary embeddings are not one kernel"]),
        (("transformer_engine", "apex"), []),
    ],
)
def test_on_a_gpu_it_says_what_missing_kernels_cost_and_how_to_get_them(
    installed: tuple[str, ...], costs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert costs_of_missing_kernels() == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    _make_package(tmp_path, *installed)
    monkeypatch.syspath_prepend(tmp_path)
    lines = costs_of_missing_kernels()
    assert len(lines) == len(costs)
    for line, cost in zip(lines, costs, strict=True):
        assert cost in line
        assert "pip install 'megatron_rmipo[te]'" in line or "README.md" in line


def test_deprecations_of_megatrons_own_are_not_shown_and_all_else_is(caplog: pytest.LogCaptureFixture) -> None:
    hide_deprecation_banners()
    model = logging.getLogger("megatron.core.models.gpt.gpt_model")
    saving = logging.getLogger("megatron.core.dist_checkpointing.strategies.torch")
    # As 0.19.1 has them.
    model.warning("GPTModel IS DEPRECATED. GPTModel is only accepting critical bug fixes, no new features.")
    saving.warning("MCore's async save is deprecated and will be removed in the future releases.")
    saving.warning("something of the checkpoint")
    ddp = logging.getLogger("megatron.core.distributed.distributed_data_parallel")
    ddp.warning("Callers should pre-compute layouts and pass them in.")
    model.error("deprecated and broken")
    assert caplog.messages == ["something of the checkpoint", "deprecated and broken"]
