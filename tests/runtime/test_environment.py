import importlib.util
from pathlib import Path

import pytest

from megatron_rmipo.errors import ConfigError
from megatron_rmipo.runtime.environment import check_environment


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


@pytest.mark.parametrize("name", ["psutil", "wandb"])
def test_what_is_missing_is_named_with_its_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == name else real(wanted))
    with pytest.raises(ConfigError, match=rf"{name}.*pip install"):
        check_environment(wandb=True)


def test_wandb_is_not_needed_where_it_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == "wandb" else real(wanted))
    check_environment()
