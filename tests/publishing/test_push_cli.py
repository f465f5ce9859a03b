"""Sending a model to the Hub, with a stand-in of its interface."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from megatron_rmipo.publishing import push_cli
from tests.checkpoint.models import write_hf_model

UPLOAD_FOLDER = huggingface_hub.HfApi.upload_folder  # as it is before the stand-in takes its place
CARD = "---\nbase_model: meta/x\ntags: [rmipo]\n---\n# It\n"


class Hub:
    """What of HfApi is used; refuses what the real one would not take."""

    def __init__(self, token: str) -> None:
        self.token, self.calls = token, []  # type: tuple[str, list[Any]]

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self.calls.append(("create", repo_id, private))

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        self.calls.append(("branch", repo_id, branch))

    def upload_folder(self, **given: Any) -> Any:
        self.calls.append(("upload", given))
        return SimpleNamespace(commit_url="https://huggingface.co/me/it/commit/1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_hf_model(tmp_path_factory.mktemp("hub") / "model", "llama2", max_shard_size="90KB")
    (directory / "README.md").write_text(CARD)
    (directory / "notes.pkl").write_text("private")
    return directory


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub("t")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: setattr(hub, "token", token) or hub)
    monkeypatch.setenv("HF_TOKEN", "secret")
    return hub


def test_nothing_is_sent_unless_it_is_asked_for(made: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert push_cli.main([str(made), "me/it"]) == 0
    shown = capsys.readouterr().out
    assert hub.calls == []
    assert "Nothing was sent" in shown
    for words in ("model.safetensors.index.json", " in all", "base_model: meta/x", "no datasets, no license"):
        assert words in shown
    assert "secret" not in shown


def test_the_model_and_nothing_else_is_sent(made: Path, hub: Hub) -> None:
    assert push_cli.main([str(made), "me/it", "--yes", "--revision", "step-6"]) == 0
    create, branch, (_, upload) = hub.calls
    assert create == ("create", "me/it", True)
    assert branch == ("branch", "me/it", "step-6")
    assert (hub.token, upload["revision"]) == ("secret", "step-6")
    assert {"config.json", "README.md", "model.safetensors.index.json"} <= set(upload["allow_patterns"])
    assert "notes.pkl" not in upload["allow_patterns"]
    inspect.signature(UPLOAD_FOLDER).bind(None, **upload)


def test_an_adapter_is_sent_without_a_model(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors", "notes.pkl"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "README.md").write_text(CARD)
    assert push_cli.main([str(tmp_path), "me/it"]) == 0
    assert hub.calls == []
    assert "adapter_model.safetensors" in capsys.readouterr().out
    assert push_cli.main([str(tmp_path), "me/it", "--yes"]) == 0
    _, (_, upload) = hub.calls
    assert upload["allow_patterns"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    (tmp_path / "adapter_model.safetensors").unlink()
    assert push_cli.main([str(tmp_path), "me/it"]) == 1
    assert "lacks adapter_model.safetensors: it is not whole" in capsys.readouterr().err


def test_what_cannot_be_sent_is_refused(
    made: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*argv: str) -> str:
        assert push_cli.main(list(argv)) == 1
        return capsys.readouterr().err

    half = tmp_path / "half"
    shutil.copytree(made, half)
    next(half.glob("*.safetensors")).unlink()
    assert "it is not whole" in refused(str(half), "me/it")
    assert "OWNER/NAME" in refused(str(made), "it")
    (half / "README.md").unlink()
    assert "holds no README.md" in refused(str(half), "me/it")
    monkeypatch.delenv("HF_TOKEN")
    assert "HF_TOKEN is not set" in refused(str(made), "me/it", "--yes")
    assert hub.calls == []

    def full(**given: Any) -> Any:
        raise OSError("403 Forbidden: no right to write\nand more")

    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(hub, "upload_folder", full)
    assert "the Hub refused me/it: 403 Forbidden: no right to write\n" in refused(str(made), "me/it", "--yes")
