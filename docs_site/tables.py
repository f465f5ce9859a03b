"""The tables of the reference, made from what the programs themselves go by; a page says where each goes: ``{{name}}``."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import transformers

from benchmarks.performance_page import markdown
from docs_site.parsers import REQUIRED, Flag, groups_of, tool_parsers, trainer_parser
from megatron_rmipo.config.values import ValueType, field_types
from megatron_rmipo.families.base import Family
from megatron_rmipo.families.registry import FAMILIES
from megatron_rmipo.families.unbuilt import UNBUILT
from megatron_rmipo.objectives.__main__ import default_in_words, needs_in_words
from megatron_rmipo.objectives.options import in_words
from megatron_rmipo.objectives.registry import OBJECTIVES, build_objective


def fill_in(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """A page's text with its tables in it, each in the place of a line that names it.

    Raises:
        KeyError: there is no such table.
    """
    return re.sub(r"^\{\{(\w+)\}\}$", lambda match: tables[match[1]](), text, flags=re.MULTILINE)


def code(text: str) -> str:
    """A text as code; nothing stays nothing."""
    return f"`{text}`" if text else ""


def prose(text: str) -> str:
    """A help text as a cell's: flags as code, and no character of it taken for markup."""
    parts = re.split(r"(?<![\w-])(--[a-z][\w-]*)", text.replace("\n", " "))
    plain = [re.sub(r"([\\*_<>\[\]{}`#])", r"\\\1", part) for part in parts[::2]]
    flags = [*map(code, parts[1::2]), ""]
    return "".join(part + flag for part, flag in zip(plain, flags, strict=True))


def default_cell(default: str) -> str:
    """A default: a value as code, words as words."""
    return prose(default) if " " in default or default == REQUIRED else code(default)


def flags_table(flags: list[Flag]) -> str:
    """Flags as a table, a line each."""
    rows = [[f"{code(flag.names)} {code(flag.value)}".strip(), default_cell(flag.default), prose(flag.help)] for flag in flags]
    return markdown(("flag", "default", "meaning"), rows)


def groups_text(parser: argparse.ArgumentParser, level: int, left_out: frozenset[str] = frozenset()) -> str:
    """A parser's flags under the titles of their groups.

    Args:
        parser: the parser.
        level: of the headings; 0: none.
        left_out: names of flags that stand elsewhere.
    """
    parts = []
    for title, flags in groups_of(parser):
        shown = [flag for flag in flags if flag.key not in left_out]
        if shown:
            name, _, rest = title.partition(": ")
            heading = f"{'#' * level} {name}\n\n" if level else ""
            parts.append(heading + (f"{prose(rest[0].upper() + rest[1:])}.\n\n" if level and rest else "") + flags_table(shown))
    return "\n\n".join(parts)


def trainer_flags() -> str:
    """All flags of the trainer but the objectives' options."""
    options = {option for name in OBJECTIVES for option in field_types(OBJECTIVES[name].Config)}
    return groups_text(trainer_parser(), 2, frozenset(options))


def tool_flags() -> str:
    """All flags of each program in tools/, under its name."""
    return "\n\n".join(
        f"## {name}\n\n{prose(parser.description or '')}\n\n{groups_text(parser, 0)}" for name, parser in tool_parsers()
    )


def objectives() -> str:
    """Each objective with its needs, its options and its presets."""
    return "\n\n".join(_objective(name) for name in OBJECTIVES)


def _objective(name: str) -> str:
    objective = build_objective(name, {})
    config, kinds = objective.config, field_types(type(objective.config))
    rows = [
        [code(_option(field.name, kinds[field.name])), code(_default(config, field.name)), prose(field.metadata.get("help", ""))]
        for field in dataclasses.fields(config)
        if field.name in kinds
    ]
    facts = f"Needs: {prose(needs_in_words(objective.needs))}. Default of `--lr`: {objective.default_lr:g}."
    facts = facts.replace("Needs: -.", "Needs nothing besides the gradient pass.")
    parts = [f"## {name}", f"{facts} [Formula, source and what TRL's loss does](../objectives/{name}.md)."]
    parts += [markdown(("option", "default", "meaning"), rows)] if rows else ["No options."]
    parts += [_presets(presets) for presets in [getattr(inspect.getmodule(type(objective)), "PRESETS", None)] if presets]
    return "\n\n".join(parts)


def _option(name: str, kind: ValueType) -> str:
    flag = name.replace("_", "-")
    if kind.base is bool:
        return f"--[no-]{flag}"
    return f"--{flag} " + ("{" + ",".join(map(str, kind.choices)) + "}" if kind.choices else kind.base.__name__.upper())


def _default(config: object, name: str) -> str:
    return default_in_words(config, name).removeprefix("-")


def _presets(presets: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [[code(preset), *(code(in_words(value)) for value in values.values())] for preset, values in presets.items()]
    return markdown(("preset", *map(code, next(iter(presets.values())))), rows)


def families() -> str:
    """What is built of each model family, as its file says it."""
    return markdown(
        ("family", "model type", "architectures", "experts", "values of config.json that are built"),
        [
            [code(name), _model_type(family), ", ".join(map(code, family.architectures)), _experts(family), _only(family)]
            for name, family in FAMILIES.items()
        ],
    )


def _model_type(family: Family) -> str:
    """What transformers calls it in config.json."""
    return code(getattr(transformers, family.architectures[0]).config_class.model_type)


def _experts(family: Family) -> str:
    if not any(rule.per_expert for rule in family.rules):
        return ""
    return "yes, and shared ones" if any(rule.of_shared_experts for rule in family.rules) else "yes"


def _only(family: Family) -> str:
    return "; ".join(f"{code(name)}: {_values(values)}" for name, values in family.only.items())


def _values(values: tuple[object, ...]) -> str:
    return " or ".join(code(in_words(value)) for value in values if value is not None) or "null"


def unbuilt() -> str:
    """Architectures that are known and not built, with the reason."""
    return markdown(("architecture", "why not"), [[code(name), prose(reason)] for name, reason in UNBUILT.items()])


TABLES: Mapping[str, Callable[[], str]] = {
    "trainer_flags": trainer_flags,
    "tool_flags": tool_flags,
    "objectives": objectives,
    "families": families,
    "unbuilt": unbuilt,
}
