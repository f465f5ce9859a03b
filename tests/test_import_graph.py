"""Who may import whom: read from the source, nothing is imported."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "megatron_rmipo"

# A part of the package -> the parts it may import, besides itself.
MAY_IMPORT = {
    "errors": set(),
    "config": {"errors"},
    "runtime": {"errors", "config"},
    "objectives": {"errors", "config"},
    "data": {"errors", "config"},
    "model": {"errors", "config", "runtime", "data", "objectives"},
    "checkpoint": {"errors", "config", "runtime", "data", "objectives", "model"},
    "embedded": {"errors"},
    "training": {"errors", "config", "runtime", "data", "objectives", "model", "checkpoint"},
    "train": {"errors", "training"},
}
TORCH_ALONE = {"torch"} | set(sys.stdlib_module_names)


def _part(module: str) -> str:
    """``megatron_rmipo.data.reading.rows`` -> ``data``; the modules config, config_parsing ... are one part."""
    name = module.split(".")[1] if "." in module else ""
    return "config" if name.startswith("config") else name


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


def test_every_part_has_its_place_in_the_order() -> None:
    assert {_part(module) for module in SOURCES} - {""} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_point_down_only(module: str) -> None:
    part = _part(module)
    allowed = MAY_IMPORT[part] | {part} if part else set()
    used = {_part(name) for name in SOURCES[module] if name.startswith(PACKAGE + ".")}
    assert used <= allowed, f"{module} imports {sorted(used - allowed)}; it may import {sorted(allowed)}"


@pytest.mark.parametrize("module", sorted(name for name in SOURCES if _part(name) == "objectives"))
def test_objectives_import_torch_alone(module: str) -> None:
    foreign = {name.split(".")[0] for name in SOURCES[module]} - TORCH_ALONE - {PACKAGE}
    assert not foreign
    assert not {name for name in SOURCES[module] if name.startswith("torch.distributed")}


@pytest.mark.parametrize("module", sorted(name for name in SOURCES if _part(name) == "data"))
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
