"""Who may import whom: read from the source, nothing is imported."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "megatron_rmipo"

# A room of the package -> the rooms it may import, besides itself.
MAY_IMPORT = {
    "errors": set(),
    "whole_files": set(),
    "command": {"errors"},
    "torchrun": {"errors"},
    "remote_paths": {"errors"},
    "config": {"errors", "whole_files", "torchrun", "remote_paths"},
    "runtime": {"errors", "command", "torchrun"},
    "health": {"errors", "torchrun", "runtime"},
    "objectives": {"errors", "config"},
    "data": {"errors", "command", "runtime"},
    "embedded": {"errors", "command"},
    "evaluation_file": {"errors", "whole_files"},
    "generation": {"errors", "command", "data", "evaluation_file"},
    "judging": {"errors", "command", "evaluation_file", "generation"},
    "families": {"errors"},
    "model": {"errors", "torchrun", "config", "runtime", "data", "families"},
    "optimizer": {"config", "runtime"},
    "memory": {"errors", "whole_files", "config", "runtime", "data", "families", "model"},
    "passes": {"errors", "config", "runtime", "objectives", "data", "families", "model", "memory"},
    "planning": {"errors", "command", "config", "objectives", "data", "families", "model", "memory", "passes"},
    "plugin": {"errors", "whole_files", "config", "runtime", "objectives", "data", "model", "passes"},
    "checkpoint": {"errors", "torchrun", "command", "config", "runtime", "data", "families", "model", "optimizer"},
    "scoring": {"errors", "command", "config", "runtime", "objectives", "data", "model", "memory", "passes", "checkpoint"},
    "evaluation": {
        *("errors", "command", "config", "runtime", "objectives", "data", "model", "memory", "passes", "checkpoint", "scoring"),
        "evaluation_file",
    },
    "reports": {
        *("errors", "whole_files", "command", "torchrun", "config", "runtime", "health", "objectives", "data", "memory"),
        "evaluation_file",
    },
    "publishing": {"errors", "command", "config", "data", "reports"},
    "doctor": {"errors", "command", "torchrun", "runtime", "data", "model"},
    "completion": {"command", "entry"},
    "__main__": {"entry"},
    "training": {
        *("errors", "command", "config", "runtime", "objectives", "data", "families", "model", "memory", "passes", "checkpoint"),
        *("whole_files", "torchrun", "health", "optimizer", "scoring", "reports", "planning", "publishing"),
    },
    # What every command starts with, and what starts it on several ranks.
    "entry": {"errors", "command", "torchrun", "remote_paths"},
    "launch": {"entry"},
    "stage_record": {"errors", "whole_files", "command", "entry"},
    "train": {"entry"},
}
# The rooms inside a room, where they have floors of their own.
INNER_ROOMS = {
    "config": {"flags": {"options"}},
    "data": {
        "reading": set(),
        "layouts": {"reading"},
        "store": set(),
        "encoding": {"reading", "store"},
        "preparing": {"reading", "layouts", "store", "encoding"},
        "batches": {"store"},
    },
    "checkpoint": {
        "peft": {"whole_directories"},
        "hf": {"peft", "whole_directories", "raw_files"},
        "merging": {"peft", "hf", "whole_directories", "flag_types"},
        "shares": set(),
        "saved_adapters": {"megatron", "peft"},
        "megatron": {"hf", "peft", "shares", "whole_directories", "raw_files"},
    },
    "reports": {
        "pictures": {"held_out", "reporter", "summary", "comparison"},
        "page": {"held_out", "summary", "reporter", "comparison", "timers"},
        "trackers": set(),
    },
    "training": {"course": {"data", "outputs", "progress", "setup", "step"}},
    "model": {
        "attention": set(),
        "layers": {"attention", "products", "transformer_engine"},
        "lora": {"layers", "packed_model", "named_tensors"},
        "problems": {"attention", "hybrid", "layers", "lora", "transformer_engine"},
    },
    "plugin": {"adapters": {"batches", "step", "scores", "response_rows", "mismatched_rows", "without_adapters"}},
}
# So many files a room holds at most; these have one file each of something.
MOST_FILES, A_FILE_EACH = 15, {"objectives", "families"}
TORCH_ALONE = {"torch"} | set(sys.stdlib_module_names)


def _room(module: str, depth: int = 1) -> str:
    """``megatron_rmipo.data.reading.rows`` -> ``data``, its room at depth 1, or ``reading`` at depth 2; "" if none."""
    parts = module.split(".")
    return parts[depth] if len(parts) > depth else ""


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST, module: str, is_package: bool = False) -> set[str]:
    """Every module an import statement names, wherever it stands; of ``from a import b`` both ``a`` and ``a.b``."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".") if is_package else module.split(".")[:-1]
                above = above[: len(above) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def _sources() -> dict[str, set[str]]:
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    return {
        _module_name(path): imports_of(ast.parse(path.read_text(encoding="utf-8")), _module_name(path), path.stem == "__init__")
        for path in files
    }


SOURCES = _sources()


def test_the_reader_of_imports_sees_every_form() -> None:
    text = "import a.b\nfrom c import d\ndef f():\n    from ..x import y\n    from . import z\n"
    assert imports_of(ast.parse(text), "p.q.r") == {"a.b", "c", "c.d", "p.x", "p.x.y", "p.q", "p.q.z"}
    assert imports_of(ast.parse("from .x import y"), "p.q", is_package=True) == {"p.q.x", "p.q.x.y"}


def test_every_room_has_its_floor() -> None:
    assert {_room(module) for module in SOURCES} - {""} == set(MAY_IMPORT)
    folders = {path.parent.relative_to(ROOT / PACKAGE).parts for path in (ROOT / PACKAGE).rglob("*.py")}
    assert {folder[:1] for folder in folders if folder} == {folder for folder in folders if len(folder) == 1}
    inner = {folder for folder in folders if len(folder) > 1}
    assert inner == {(room, name) for room, names in INNER_ROOMS.items() for name in names}


def test_floors_make_no_circle() -> None:
    for floors in (MAY_IMPORT, *INNER_ROOMS.values()):
        below = {room: set(rooms) for room, rooms in floors.items()}
        for _ in below:
            for rooms in below.values():
                rooms.update(*(below.get(room, ()) for room in set(rooms)))
        assert not {room for room, rooms in below.items() if room in rooms}


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_point_down_only(module: str) -> None:
    room = _room(module)
    allowed = MAY_IMPORT[room] | {room} if room else set()
    used = {_room(name) for name in SOURCES[module] if name.startswith(PACKAGE + ".")}
    assert used <= allowed, f"{module} imports {sorted(used - allowed)}; it may import {sorted(allowed)}"


@pytest.mark.parametrize("module", sorted(name for name in SOURCES if _room(name, 2) in INNER_ROOMS.get(_room(name), ())))
def test_imports_inside_a_room_point_down_only(module: str) -> None:
    room, own = _room(module), _room(module, 2)
    used = {_room(name, 2) for name in SOURCES[module] if name.startswith(f"{PACKAGE}.{room}.")}
    allowed = INNER_ROOMS[room][own] | {own}
    assert used <= allowed, f"{module} imports {sorted(used - allowed)}; it may import {sorted(allowed)}"


def test_no_circle_of_files() -> None:
    waiting = {module: {name for name in names if name in SOURCES and name != module} for module, names in SOURCES.items()}
    while free := {module for module, names in waiting.items() if not names & set(waiting)}:
        waiting = {module: names for module, names in waiting.items() if module not in free}
    assert not waiting, f"these import each other, or what does: {sorted(waiting)}"


def test_rooms_can_be_held_in_the_head() -> None:
    folders = {path.parent for path in (ROOT / PACKAGE).rglob("*.py") if path.parent.name not in A_FILE_EACH}
    counts = {str(folder): sum(file.name != "__init__.py" for file in folder.glob("*.py")) for folder in folders}
    assert not {name: count for name, count in counts.items() if count > MOST_FILES}


@pytest.mark.parametrize("module", sorted(name for name in SOURCES if _room(name) == "objectives"))
def test_objectives_import_torch_alone(module: str) -> None:
    foreign = {name.split(".")[0] for name in SOURCES[module]} - TORCH_ALONE - {PACKAGE}
    assert not foreign
    assert not {name for name in SOURCES[module] if name.startswith("torch.distributed")}


@pytest.mark.parametrize("module", sorted(name for name in SOURCES if _room(name) == "data"))
def test_data_knows_no_model(module: str) -> None:
    models = {
        name for name in SOURCES[module] if name.startswith("megatron.core.") and not name.startswith("megatron.core.datasets")
    }
    models |= {name for name in SOURCES[module] if name.startswith("transformers.") and "Model" in name}
    assert not models


def test_only_runtime_groups_reads_parallel_state() -> None:
    readers = set()
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {part for name in SOURCES[_module_name(path)] for part in name.split(".")}
        if names & {"parallel_state", "mpu"}:
            readers.add(_module_name(path))
    assert readers == {f"{PACKAGE}.runtime.groups"}


def test_tools_and_examples_are_imported_by_nobody() -> None:
    users = {module for module, names in SOURCES.items() if any(name.split(".")[0] in ("tools", "examples") for name in names)}
    assert not users
