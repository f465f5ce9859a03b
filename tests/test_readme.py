"""README.md, CONTRIBUTING.md and docs/ name only what exists: targets, files, commands and flags."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rmipo.training.arguments import parse_arguments

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
DOCUMENTS = {path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
# Names that stand for the reader's own, or for what a run makes.
OUTPUTS = ("data/pairs", "work/", "runs/", ".venv")


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def command_lines(text: str) -> list[list[str]]:
    """Every command of the code blocks as words, continuation lines joined, comments dropped."""
    lines = "\n".join(code_blocks(text)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(python|torchrun|make|bash|[A-Z_]+=\S+ )", line)]


def tool_commands() -> list[list[str]]:
    found = [words for text in DOCUMENTS.values() for words in command_lines(text)]
    return [words for words in found if words[0] == "python" and words[1].startswith("tools/")]


def test_the_commands_are_found() -> None:
    first = {words[0] for words in command_lines(README)}
    assert {"make", "python", "torchrun"} <= first
    assert len(tool_commands()) >= 3


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_make_targets_exist(text: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shown = "\n".join(code_blocks(text) + re.findall(r"`[^`\n]+`", text))
    named = set(re.findall(r"`?\bmake ([a-z-]+)\b", shown))
    assert named
    assert named <= targets


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_paths_exist(text: str) -> None:
    quoted = set(re.findall(r"`([\w./-]*[/.][\w./-]*)`", text)) | set(re.findall(r"\]\(([\w./-]+)\)", text))
    names = {name for name in quoted if not name.startswith(OUTPUTS) and name not in ("data/", ".bin/.idx")}
    assert names
    roots = (ROOT, ROOT / "megatron_rmipo", ROOT / "megatron_rmipo/objectives")
    modules = {name for name in names if re.fullmatch(r"megatron_rmipo(\.\w+)+", name)}
    missing = [name for name in names - modules if not any((root / name).exists() for root in roots)]
    assert not missing
    assert all((ROOT / (name.replace(".", "/") + ".py")).exists() for name in modules)


def test_the_annotated_tree_is_the_tree() -> None:
    (tree,) = [block for block in code_blocks(README) if block.startswith("megatron_rmipo/")]
    top = {line.split()[0].rstrip("/") for line in tree.splitlines() if not line.startswith(" ")}
    assert all((ROOT / name).is_dir() for name in top)
    inside = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.startswith("  ") and not line.startswith("   ")}
    packages = {path.parent.name for path in (ROOT / "megatron_rmipo").glob("*/__init__.py")}
    assert packages == {name for name in inside if "." not in name and "*" not in name}


def test_the_trainers_commands_parse() -> None:
    found = [words for text in DOCUMENTS.values() for words in command_lines(text)]
    trainings = [words for words in found if "megatron_rmipo.train" in words and "--help" not in words]
    assert trainings
    for words in trainings:
        parse_arguments(words[words.index("megatron_rmipo.train") + 1 :])


@pytest.mark.parametrize("tool", sorted({words[1] for words in tool_commands()}))
def test_the_tools_have_the_flags_they_are_shown_with(tool: str) -> None:
    result = subprocess.run([sys.executable, tool, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    flags = {word.split("=")[0] for words in tool_commands() if words[1] == tool for word in words if word.startswith("--")}
    missing = [flag for flag in flags if not re.search(rf"{flag}\b", result.stdout)]
    assert not missing


def test_tools_are_thin() -> None:
    for path in (ROOT / "tools").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 30, path.name


def test_console_commands_lead_to_functions() -> None:
    import importlib

    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    commands = dict(re.findall(r'"(megatron-rmipo-[a-z-]+)": "([\w.:]+)"', text))
    assert "megatron-rmipo-train" in commands
    for target in commands.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))
