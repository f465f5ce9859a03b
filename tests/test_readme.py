"""The documents name only what exists: targets, files, flags, variables; each command is parsed by the program it names."""

from __future__ import annotations

import argparse
import importlib
import re
import runpy
import shlex
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_rmipo import entry
from megatron_rmipo.objectives.arguments import parse_arguments
from megatron_rmipo.plugin.adapters.megatron_lm import add_arguments

ROOT = Path(__file__).parent.parent
PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PATHS}
README, CONTRIBUTING = DOCUMENTS["README.md"], DOCUMENTS["CONTRIBUTING.md"]
# Those that show nothing to run.
WITHOUT_COMMANDS = {name for name in DOCUMENTS if name.startswith(("docs/objectives/", "docs/explanation/"))} | {
    *("docs/plugin/log_probs.md", "docs/reference/families.md", "docs/reference/run_directory.md", "docs/reference/tools.md"),
    "docs/migrating.md",
}
# Of slime, whose losses ours may be.
SLIME_FLAGS = {
    *("--calculate-per-token-loss", "--custom-loss-function-path", "--disable-compute-advantages-and-returns"),
    *("--micro-batch-size", "--recompute-loss-function", "--ref-load", "--use-kl-loss"),
}
# Of torchrun, in printed plans.
TORCHRUN_FLAGS = {"--nnodes", "--node-rank", "--master-addr", "--master-port"}
SHELLS = ("", "bash", "sh", "console")
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:python|torchrun|make|bash|pip|source) ")
# Where names in a document may be rooted.
ROOTS = ("", "megatron_rmipo", "megatron_rmipo/objectives", "megatron_rmipo/checkpoint", "benchmarks", "docs", "tools")
# Names that stand for the reader's own, or for what a run makes.
OUTPUTS = ("data/pairs", "SAVE/", "PREFIX", "work/", "runs/", "site/", ".venv", "DIR/", "iter_", "hf/", "/p")
OUTPUT_FILES = {"config.yaml", "run_config.yaml", "data/", "heartbeats/", "out_of_memory/", "additional_chat_templates/"}
# Flags of programs that are not ours.
FOREIGN_FLAGS = {
    *("--no-build-isolation", "--nproc-per-node", "--max-restarts"),
    # Of sbatch, docker and what copies from object stores.
    *("--nodes", "--file", "--tag", "--recursive"),
    # Of vLLM.
    *("--enable-lora", "--max-lora-rank", "--lora-modules"),
    # Of Megatron's, told why they are not here.
    *("--use-megatron-fsdp", "--use-torch-optimizer-for-cpu-offload"),
}
# Of Megatron-LM's parser, beside which ours stand; tests/plugin/adapters looks them up in it.
MEGATRON_LM_FLAGS = {
    "--attention-dropout",
    "--no-bias-gelu-fusion",
    *("--distributed-backend", "--transformer-impl", "--use-cpu-initialization", "--no-check-for-nan-in-loss-and-grad"),
    *("--no-rope-fusion", "--no-masked-softmax-fusion", "--no-gradient-accumulation-fusion", "--no-persist-layer-norm"),
    *("--no-bias-dropout-fusion", "--no-bias-swiglu-fusion"),
    "--use-checkpoint-args",
    "--calculate-per-token-loss",
    "--dataloader-type",
    "--eval-global-batch-size",
    "--eval-iters",
    "--full-validation",
    "--hidden-dropout",
    "--hidden-size",
    "--micro-batch-size",
    "--mock-data",
    "--mtp-num-layers",
    "--num-layers",
    "--context-parallel-size",
    "--num-layers-per-virtual-pipeline-stage",
    "--test-data-path",
    "--tokenizer-type",
    "--train-data-path",
    "--vocab-size",
}
# Scripts in which our flags stand beside another program's.
PLUGIN_SCRIPTS = "examples/plugins/"
# Programs that are files, each with a parser of its own.
PROGRAMS = ("tools/", "examples/embedded/", "examples/plugins/own_loop.py")


class ParsedError(Exception):
    """Raised where a program would start to work."""


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    return re.findall(r"^```([\w-]*)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands_of(text: str) -> list[list[str]]:
    """Every command shown in a block or between backticks, as words; continuation lines joined, comments dropped."""
    shown = "".join(body for language, body in blocks(text) if language in SHELLS)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    # Between backticks a program's name alone is no command.
    lines = shown.replace("\\\n", " ").splitlines() + re.findall(r"`([^`]+)`", prose)
    return [shlex.split(line, comments=True) for line in lines if COMMAND.match(line)]


def program(words: list[str]) -> tuple[str, list[str]]:
    """(tool's path or module, its arguments) of a command that starts Python, else ("", [])."""
    for number, word in enumerate(words):
        # The launcher starts another program, as torchrun does.
        if word == "-m" and words[number + 1].startswith(("megatron_rmipo", "benchmarks")) and "launch" not in words[number + 1]:
            return words[number + 1], words[number + 2 :]
        if word.startswith(PROGRAMS):
            return word, words[number + 1 :]
    return "", []


def main_of(name: str) -> Callable[[list[str]], object]:
    """Where a program starts that is a module, or a file of ours: the command that it hands over to, or its own."""
    if not name.endswith(".py"):
        module = importlib.import_module(name)
        return module.main if hasattr(module, "main") else importlib.import_module(f"{name}.__main__").main
    commands = re.findall(r"^from megatron_rmipo.entry import (\w+)$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
    if commands:
        return main_of(getattr(entry, commands[0]).args[0])
    return runpy.run_path(str(ROOT / name))["main"]


def parse_as(monkeypatch: pytest.MonkeyPatch, name: str, arguments: list[str]) -> set[str]:
    """Have the program parse the arguments and do nothing more; its flags. It refuses by SystemExit or a typed error."""
    known: set[str] = set()
    parse, parse_known = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args

    def note_flags(self: argparse.ArgumentParser, *rest: object, **options: object) -> object:
        known.update(self._option_string_actions)
        return parse_known(self, *rest, **options)  # type: ignore[call-overload]

    def stop(self: object, *rest: object, **options: object) -> None:
        if isinstance(self, argparse.ArgumentParser):
            parse(self, *rest, **options)  # type: ignore[call-overload]
        raise ParsedError

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", note_flags)
        if name == "megatron_rmipo.train":
            parse_arguments(arguments)
            return known
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        # These share the trainer's parser, which tells unknown flags by itself.
        patch.setattr("megatron_rmipo.scoring.score_cli.score", stop)
        patch.setattr("megatron_rmipo.evaluation.cli.evaluate", stop)
        with pytest.raises(ParsedError):
            main_of(name)(arguments)
    return known


@pytest.fixture(autouse=True)
def _mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader's file mine.py, as a tutorial has it written."""
    (block,) = [body for language, body in blocks(DOCUMENTS["docs/tutorials/your_objective.md"]) if language == "python"]
    (tmp_path / "mine.py").write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_commands_are_found(name: str) -> None:
    assert (commands_of(DOCUMENTS[name]) == []) == (name in WITHOUT_COMMANDS)


def test_commands_are_read_from_every_kind_of_block() -> None:
    text = "```bash\npython tools/a.py \\\n    --x 1  # why\n```\nor `make b`, `python`\n```\nA=1 bash c.sh\n```\n"
    text += "```python\nmake = 1\n```\n"
    assert commands_of(text) == [["python", "tools/a.py", "--x", "1"], ["A=1", "bash", "c.sh"], ["make", "b"]]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_parse(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for words in commands_of(DOCUMENTS[name]):
        target, arguments = program(words)
        if target and "--help" not in arguments:
            parse_as(monkeypatch, target, arguments)
        elif any(word.startswith(PLUGIN_SCRIPTS) for word in words):
            assert all((ROOT / word).is_file() for word in words if word.startswith(PLUGIN_SCRIPTS)), words
        elif any(word in ("python", "torchrun") for word in words) and not target:
            raise AssertionError(f"{' '.join(words)}: starts neither a tool nor a module of this project")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_flags_exist(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    known = (
        FOREIGN_FLAGS | TORCHRUN_FLAGS | MEGATRON_LM_FLAGS | set(add_arguments(argparse.ArgumentParser())._option_string_actions)
    )
    # Of two objectives, whose common options are flags of each, and of the tutorial's own.
    samples = {
        "megatron_rmipo.train": ["--load", "x", "--objective", "dpo,simpo,mine:Capped"],
        "megatron_rmipo.objectives": [],
        "benchmarks.bench_step": [],
        "benchmarks.bench_pipeline": [],
    }
    for words in (words for text in DOCUMENTS.values() for words in commands_of(text)):
        target, arguments = program(words)
        if target.endswith(".py"):
            samples.setdefault(target, arguments)
    for target, arguments in samples.items():
        known |= parse_as(monkeypatch, target, arguments)
    # The first column has flags of others, which tests/config/test_migrating.py looks up.
    text = re.sub(r"^\| `--[\w-]+` ", "", DOCUMENTS[name], flags=re.MULTILINE) if name == "docs/migrating.md" else DOCUMENTS[name]
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", text))
    named -= SLIME_FLAGS if name == "docs/plugin/frameworks.md" else set()
    assert named <= known, named - known


def test_a_flag_that_is_not_there_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        parse_as(monkeypatch, "tools/inspect_pairs.py", ["data/pairs", "3", "--colour"])
    with pytest.raises(Exception, match="--bata"):
        parse_as(monkeypatch, "megatron_rmipo.train", ["--load", "x", "--bata", "2"])


@pytest.mark.parametrize("name", DOCUMENTS)
def test_scripts_exist_and_read_the_variables(name: str) -> None:
    known = "".join(path.read_text(encoding="utf-8") for path in [*(ROOT / "examples").glob("*.sh"), ROOT / "Makefile"])
    for words in commands_of(DOCUMENTS[name]):
        if "bash" in words:
            assert (ROOT / words[words.index("bash") + 1]).is_file(), words
        if words[0] != "pip" and "pip" not in words:
            variables = re.findall(r"^([A-Z_]+)=", "\n".join(words), re.MULTILINE)
            assert all(re.search(rf"\b{variable}\b", known) for variable in variables), words


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shown = "\n".join([body for _, body in blocks(DOCUMENTS[name])] + re.findall(r"`[^`\n]+`", DOCUMENTS[name]))
    named = set(re.findall(r"`?\bmake ([a-z-]+)\b", shown))
    assert named or name.startswith("docs/")
    assert named <= targets


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_exist(name: str) -> None:
    text = re.sub(r"^```.*?^```$", "", DOCUMENTS[name], flags=re.MULTILINE | re.DOTALL)
    links = set(re.findall(r"\]\(([\w./-]+)\)", text))
    assert all(((ROOT / name).parent / link).exists() for link in links), links
    quoted = set(re.findall(r"`([\w./-]*[/.][\w./-]*)`", text))
    names = {
        quote for quote in quoted if not quote.startswith(OUTPUTS) and quote not in OUTPUT_FILES and not quote.startswith(".")
    }
    modules = {quote for quote in names if re.fullmatch(r"(megatron_rmipo|benchmarks)(\.\w+)+", quote)}
    missing = [
        quote
        for quote in names - {module for module in modules if (ROOT / (module.replace(".", "/") + ".py")).exists()}
        if not any((ROOT / root / quote).exists() for root in ROOTS)
    ]
    # Names with a slash may be metrics; those that begin with a folder of ours are paths.
    suffixes = (".py", ".md", ".sh", ".csv", ".toml", ".yaml", ".sbatch", "/")
    missing = [quote for quote in missing if quote.endswith(suffixes) or (ROOT / quote.split("/")[0]).is_dir()]
    assert not missing


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_blocks_import_what_exists(name: str) -> None:
    for language, body in blocks(DOCUMENTS[name]):
        if language == "python":
            compile(body, name, "exec")
            if "from megatron.bridge" in body:
                # Its adapter can be imported where that program can.
                continue
            imports = re.findall(r"^from (megatron_rmipo\S*) import (.+)$", body, re.MULTILINE)
            assert imports
            named = [(module, item) for module, items in imports for item in items.split(", ")]
            assert all(hasattr(importlib.import_module(module), item) or find_spec(f"{module}.{item}") for module, item in named)


def test_the_annotated_tree_is_the_tree() -> None:
    (tree,) = [block for _, block in blocks(README) if block.startswith("megatron_rmipo/")]
    top = {line.split()[0].rstrip("/") for line in tree.splitlines() if not line.startswith(" ")}
    assert all((ROOT / name).is_dir() for name in top)
    inside = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.startswith("  ") and not line.startswith("   ")}
    packages = {path.parent.name for path in (ROOT / "megatron_rmipo").glob("*/__init__.py")}
    assert packages == {name for name in inside if "." not in name and "*" not in name}


def test_tools_are_thin() -> None:
    for path in (ROOT / "tools").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 30, path.name


def test_console_commands_lead_to_functions() -> None:
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    commands = dict(re.findall(r'"(megatron-rmipo-[a-z-]+)": "([\w.:]+)"', text))
    assert "megatron-rmipo-train" in commands
    for target in commands.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))
