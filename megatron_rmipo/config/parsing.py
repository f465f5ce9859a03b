"""Flags and YAML files into a :class:`~megatron_rmipo.config.schema.Config`.

The flags of the dataclasses in :mod:`megatron_rmipo.config.schema` are known here; those of the objectives are handed in, so that
this module does not depend on them.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_rmipo.config.command_line import normalize, read_line, tell_once
from megatron_rmipo.config.precedence import without_what_gives_way
from megatron_rmipo.config.schema import Config, ObjectiveConfig
from megatron_rmipo.config.unknown_flags import describe_unknown_key, flag_of
from megatron_rmipo.config.values import ValueType, convert, field_types
from megatron_rmipo.config.yaml_file import Given, commented_yaml, read_yaml
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.remote_paths import remote_path_problem
from megatron_rmipo.torchrun import launch_for_messages

# What the command line alone can say.
_OF_THE_LINE = {"config": ValueType(str), "print_config": ValueType(bool)}


class _Parser(argparse.ArgumentParser):
    """An argument parser whose faults are typed errors."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See --help.")


def parse_config(
    argv: Sequence[str],
    objectives: Mapping[str, type],
    load_options: Callable[[str], type],
    prog: str = "python -m megatron_rmipo.train",
    defaults_of: Callable[[str], Mapping[str, object]] = lambda name: {},
) -> Config:
    """Read a run's configuration from the command line and the YAML file it may name.

    Args:
        argv: the arguments, without the program's name.
        objectives: name of an objective -> dataclass of its options; each field may have ``metadata={"help": ...}``.
        load_options: the dataclass for any other name, of types that flags can have; ValueError: it names no objective.
        prog: how the program was started, for ``--help``.
        defaults_of: name of an objective -> flags of the trainer with the values they have where nothing is given.

    Raises:
        ConfigError: an unknown flag or key (named with the nearest), a value of the wrong type, an option of another objective.
        SystemExit: after ``--help`` and ``--print-config``.
    """
    tokens = normalize(argv)
    early = _Parser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    early.add_argument("--objective")
    chosen, _ = early.parse_known_args(tokens)
    given = read_yaml(Path(chosen.config)) if chosen.config else {}
    default_name = str(ObjectiveConfig().objective)
    name = chosen.objective or (str(given["objective"].raw) if "objective" in given else default_name)
    objectives = {**objectives, name: _options_class(name, objectives, load_options)}
    flags = _all_flags(objectives)

    line, problems = read_line(_build_parser(prog, objectives, flags), tokens, flags)
    options_of = lambda old: field_types(_options_class(old, objectives, load_options))  # noqa: E731
    given = without_what_gives_way(given, line, options_of, defaults_of, tell_once)
    problems += [describe_unknown_key(given[key].source, key, flags) for key in given if key not in flags]
    problems += [problem for value in (*given.values(), *line.values()) for problem in _remote_paths(value)]
    _refuse(problems)
    own = {key: Given(value, f"--objective {name}") for key, value in defaults_of(name).items()}
    given = {**own, **given, **{key: value for key, value in line.items() if key not in _OF_THE_LINE}}
    config = _assemble(given, name, objectives)
    if "print_config" in line:
        if launch_for_messages().rank == 0:
            print(_with_sources(config, given, name), end="", flush=True)
        raise SystemExit(0)
    return config


def _with_sources(config: Config, given: Mapping[str, Given], objective: str) -> str:
    """The whole configuration as YAML, with where each value comes from."""
    own = {key for section in _sections() for key in field_types(section)}
    defaults = {key: "default" if key in own else f"default of --objective {objective}" for key in config.to_flat_dict()}
    return commented_yaml(config.to_flat_dict(), defaults | {key: one.source for key, one in given.items()})


def parse_fields(
    argv: Sequence[str],
    fields: Mapping[type, Sequence[str]],
    prog: str,
    description: str,
    objectives: Mapping[str, type] | None = None,
    load_options: Callable[[str], type] | None = None,
) -> dict[type, Any]:
    """Read some of a run's flags, for a command that shares them with the trainer.

    Args:
        argv: the arguments, without the program's name.
        fields: section of the configuration -> names of those of its fields that are flags here.
        prog, description: for ``--help``.
        objectives, load_options: as of :func:`parse_config`, for a command with a flag ``--objective`` of its own, which need not
            be given.

    Returns:
        Each section with the given values, defaults elsewhere; :class:`ObjectiveConfig` where an objective is named.

    Raises:
        ConfigError: an unknown flag (named with the nearest), a value of the wrong type, or an option of another objective.
        SystemExit: after ``--help``.
    """
    kinds = {section: {name: field_types(section)[name] for name in names} for section, names in fields.items()}
    flags = {name: kind for section in kinds.values() for name, kind in section.items()}
    name, known = None, dict(objectives or {})
    if load_options is not None:
        name = _objective_named(argv)
        known |= {} if name is None else {name: _options_class(name, known, load_options)}
    helps = _option_helps(known)
    options = {key: kind for key, kind in _all_flags(known).items() if key in helps}
    parser = _new_parser(prog, f"{prog} [--FLAG VALUE ...]", description, epilog="The flags are those of the trainer.")
    for section, names in fields.items():
        _add_section(parser, section, names, flags, list(known))
    if options:
        _add_options(parser, helps, options)
    given, problems = read_line(parser, normalize(argv), {**flags, **options})
    sections = {section: section(**_converted(given, section_kinds, problems)) for section, section_kinds in kinds.items()}
    chosen = {key: given[key] for key in options if key in given}
    if name is None:
        problems += [f"{one.source} does nothing without --objective NAME" for one in chosen.values()]
    else:
        resolved = _objective_options(chosen, name, known, problems)
        sections[ObjectiveConfig] = ObjectiveConfig(objective=name, options=resolved)
    _refuse(problems)
    return sections


def _objective_named(argv: Sequence[str]) -> str | None:
    early = _Parser(add_help=False, allow_abbrev=False)
    early.add_argument("--objective")
    name: str | None = early.parse_known_args(normalize(argv))[0].objective
    return name


def _remote_paths(given: Given) -> Iterator[str]:
    for value in given.raw if isinstance(given.raw, list) else [given.raw]:
        problem = remote_path_problem(given.source, value) if isinstance(value, str) else None
        if problem is not None:
            yield problem


def add_objective_flags(
    parser: argparse.ArgumentParser, argv: Sequence[str], objectives: Mapping[str, type], load_options: Callable[[str], type]
) -> None:
    """Add ``--objective``, its switches and the options of all objectives to the parser of another program.

    Args:
        parser: has all its other flags already; those that are not given end up as None, or as the trainer's default.
        argv: the command line, for the options of an objective that is not among ``objectives``.
        objectives, load_options: as of :func:`parse_config`.

    Raises:
        ConfigError: there is no such objective, or an option of it is a flag of the other program.
    """
    early = _Parser(add_help=False, allow_abbrev=False)
    early.add_argument("--objective", default=str(ObjectiveConfig().objective))
    name = early.parse_known_args(list(argv))[0].objective
    objectives = {**objectives, name: _options_class(name, objectives, load_options)}
    flags = _all_flags(objectives)
    taken = {action.dest for action in parser._actions} | {flag for action in parser._actions for flag in action.option_strings}
    for key in ("objective", "pair_weight", *_option_helps(objectives)):
        if key in taken or flag_of(key) in taken:
            raise ConfigError(f"{flag_of(key)}: an option of the objective is a flag of this program; give it another name.")
    _add_section(parser, ObjectiveConfig, ["objective", "pair_weight"], flags, list(objectives))
    parser.set_defaults(objective=name, pair_weight=False)
    _add_options(parser, _option_helps(objectives), flags)


def read_objective_flags(
    values: Mapping[str, object], objectives: Mapping[str, type], load_options: Callable[[str], type]
) -> ObjectiveConfig:
    """What flags that :func:`add_objective_flags` added say.

    Args:
        values: name -> what the other program's parser found, None for what is not given; other names are not looked at.
        objectives, load_options: as there.

    Raises:
        ConfigError: a value of the wrong type, or an option of another objective.
    """
    name = str(values["objective"])
    objectives = {**objectives, name: _options_class(name, objectives, load_options)}
    given = {key: Given(values[key], flag_of(key)) for key in _option_helps(objectives) if values.get(key) is not None}
    options = _objective_options(given, name, objectives, [])
    return ObjectiveConfig(objective=name, pair_weight=bool(values["pair_weight"]), options=options)


def _converted(given: Mapping[str, Given], kinds: Mapping[str, ValueType], problems: list[str]) -> dict[str, Any]:
    """The values of the given flags; what is wrong with them is added to ``problems``."""
    values: dict[str, Any] = {}
    for key, kind in kinds.items():
        if key in given:
            try:
                values[key] = convert(given[key].raw, kind)
            except ValueError as error:
                problems.append(f"{given[key].source}: {error}")
    return values


def _options_class(name: str, objectives: Mapping[str, type], load_options: Callable[[str], type]) -> type:
    if name in objectives:
        return objectives[name]
    try:
        return load_options(name)
    except ValueError as error:
        raise ConfigError(f"--objective: {error}") from error


def _all_flags(objectives: Mapping[str, type]) -> dict[str, ValueType]:
    """The value type of every flag, by name, the objectives' options last."""
    flags: dict[str, ValueType] = dict(_OF_THE_LINE)
    for section in _sections():
        flags.update(field_types(section))
    own = set(flags)
    for objective, options in objectives.items():
        for key, kind in field_types(options).items():
            if key in own:
                raise ConfigError(f"--objective {objective}: its option '{key}' is a flag of the trainer; give it another name.")
            if (flags.get(key, kind).base is bool) != (kind.base is bool):
                raise ConfigError(
                    f"--objective {objective}: its option '{key}' is a switch in one objective, a value in another."
                )
            # Each objective may know values that another does not.
            known = flags.get(key, kind).choices
            flags[key] = dataclasses.replace(kind, choices=tuple(dict.fromkeys(known + kind.choices))) if known else kind
    return flags


def _sections() -> list[type]:
    return [type(getattr(Config(), section.name)) for section in dataclasses.fields(Config)]


def _build_parser(prog: str, objectives: Mapping[str, type], flags: Mapping[str, ValueType]) -> argparse.ArgumentParser:
    parser = _new_parser(
        prog,
        f"{prog} [--config FILE] [--FLAG VALUE ...]",
        "Preference optimization on Megatron-Core. Start several ranks with torchrun.",
        epilog="Every flag may stand in the YAML file by its name with underscores; the command line wins.",
    )
    general = parser.add_argument_group("General")
    general.add_argument("--config", metavar="FILE", help="YAML file of flag names and values, flat.")
    text = "Print the whole configuration as YAML, with where each value comes from, and end; no model and no GPU is needed."
    general.add_argument("--print-config", action="store_true", help=text)
    names = [name for name in objectives if name.isidentifier()]
    for section in _sections():
        _add_section(parser, section, list(field_types(section)), flags, names)
    _add_options(parser, _option_helps(objectives), flags)
    return parser


def _add_options(parser: argparse.ArgumentParser, helps: Mapping[str, str], flags: Mapping[str, ValueType]) -> None:
    group = parser.add_argument_group("Options of the objectives (unset: the objective's own default)")
    for key, text in helps.items():
        _add_flag(group, key, flags[key], text, None)


def _new_parser(prog: str, usage: str, description: str, epilog: str) -> argparse.ArgumentParser:
    return _Parser(
        prog=prog,
        usage=usage,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=120),
        description=description,
        epilog=epilog,
    )


def _add_section(
    parser: argparse.ArgumentParser,
    section: type,
    names: Sequence[str],
    flags: Mapping[str, ValueType],
    objectives: Sequence[str],
) -> None:
    group = parser.add_argument_group((section.__doc__ or section.__name__).splitlines()[0].rstrip("."))
    for field in dataclasses.fields(section):
        if field.name in names:
            text = field.metadata["help"].replace("{objectives}", ", ".join(sorted(objectives)))
            _add_flag(group, field.name, flags[field.name], f"{text} {_default_text(field)}", field.metadata["metavar"])


def _option_helps(objectives: Mapping[str, type]) -> dict[str, str]:
    """Help of every option; objectives that say the same of one share its line."""
    users: dict[str, dict[str, list[str]]] = {}
    for objective, options in objectives.items():
        for field in dataclasses.fields(options):
            if field.name in field_types(options):
                text = f"{str(field.metadata.get('help', '')).strip()} {_default_text(field)}"
                users.setdefault(field.name, {}).setdefault(text, []).append(objective)
    return {key: " | ".join(f"{', '.join(names)}: {text}" for text, names in texts.items()) for key, texts in users.items()}


def _default_text(field: dataclasses.Field[Any]) -> str:
    default = field.default
    if default is None or default is dataclasses.MISSING:
        return ""
    return f"(default: {'on' if default is True else 'off' if default is False else default})"


def _add_flag(group: Any, key: str, kind: ValueType, text: str, metavar: str | None) -> None:
    text = text.strip().replace("%", "%%")
    if kind.base is bool:
        # --no-load-optim is Megatron's own name of a switch, so it has no opposite.
        action: Any = "store_true" if key.startswith("no_") else argparse.BooleanOptionalAction
        group.add_argument(flag_of(key), action=action, dest=key, help=text)
        return
    if metavar is None:
        metavar = "{" + ",".join(str(c) for c in kind.choices) + "}" if kind.choices else kind.base.__name__.upper()
    group.add_argument(flag_of(key), dest=key, nargs="+" if kind.is_list else None, metavar=metavar, help=text)


def _assemble(given: Mapping[str, Given], name: str, objectives: Mapping[str, type]) -> Config:
    problems: list[str] = []
    section_values = {section: _converted(given, field_types(section), problems) for section in _sections()}
    own = {key for section in _sections() for key in field_types(section)}
    options = {key: one for key, one in given.items() if key not in own}
    section_values[ObjectiveConfig]["options"] = _objective_options(options, name, objectives, problems)
    names = [section.name for section in dataclasses.fields(Config)]
    return Config(**{key: section(**section_values[section]) for key, section in zip(names, _sections(), strict=True)})


def _objective_options(
    given: Mapping[str, Given], name: str, objectives: Mapping[str, type], problems: list[str]
) -> dict[str, Any]:
    """Every option of an objective with its value, from those that are given; refuses them together with other problems."""
    kinds = field_types(objectives[name])
    options = _converted(given, kinds, problems)
    problems += [_unused_option(given[key], key, name, objectives) for key in given if key not in kinds]
    _refuse(problems)
    try:
        resolved = objectives[name](**options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--objective {name}: {error}") from error
    return {key: getattr(resolved, key) for key in kinds}


def _unused_option(given: Given, key: str, name: str, objectives: Mapping[str, type]) -> str:
    users = ", ".join(sorted(other for other, options in objectives.items() if key in field_types(options)))
    options = field_types(objectives[name])
    if of_members := [flag_of(option) for option in options if option.endswith(f"_{key}")]:
        return f"{given.source}: --objective {name} has it more than once; say which is meant: {' or '.join(of_members)}"
    own = ", ".join(map(flag_of, options)) or "none"
    return f"{given.source}: --objective {name} has no such option (it is one of: {users}). Options of {name}: {own}"


def _refuse(problems: Sequence[str]) -> None:
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError("the configuration has these faults:\n" + "\n".join(f"  - {problem}" for problem in problems))
