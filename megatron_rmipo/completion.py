"""``megatron-rmipo completion SHELL``: a script that completes commands, their flags, and the values a flag can have.

What the parsers of the commands know, written down: completing starts no Python. It is printed anew after an update.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
import sys
from collections.abc import Mapping, Sequence
from unittest import mock

from megatron_rmipo.command import run_command
from megatron_rmipo.entry import SUBCOMMANDS

# Of a command: flag -> the values it can have, where they are few.
Flags = Mapping[str, Sequence[str]]
_LISTED = re.compile(r"\{([^{}]+)\}")
# Into a file: it takes seconds, too long for every shell that opens.
_INSTALL = {
    "bash": "megatron-rmipo completion bash > ~/.megatron-rmipo.bash, and source that in ~/.bashrc",
    "zsh": "megatron-rmipo completion zsh > ~/.megatron-rmipo.zsh, and source that in ~/.zshrc, behind compinit",
    "fish": "megatron-rmipo completion fish > ~/.config/fish/completions/megatron-rmipo.fish",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the script; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="megatron-rmipo completion",
        description="Print a script that completes commands and flags.",
        epilog="; ".join(f"{shell}: {text}" for shell, text in _INSTALL.items()),
    )
    parser.add_argument("shell", choices=list(_INSTALL))
    shell = parser.parse_args(argv).shell
    return run_command(lambda: print(script(shell, {name: flags_of(name) for name in SUBCOMMANDS})))


def flags_of(name: str) -> Flags:
    """The flags of a command, as its own parser has them."""
    command, _ = SUBCOMMANDS[name]
    found: list[argparse.ArgumentParser] = []
    # Whatever makes the parser and with what: asked for its help, it shows itself.
    with (
        mock.patch.object(argparse.ArgumentParser, "print_help", lambda self, file=None: found.append(self)),
        mock.patch.object(sys, "argv", [name, "--help"]),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(SystemExit),
    ):
        importlib.import_module(command.args[0]).main(["--help"])
    return {flag: _values(action) for action in found[0]._actions for flag in action.option_strings if flag.startswith("--")}


def _values(action: argparse.Action) -> list[str]:
    if action.choices is not None:
        return [str(choice) for choice in action.choices]
    listed = _LISTED.fullmatch(action.metavar) if isinstance(action.metavar, str) else None
    return listed[1].split(",") if listed is not None else []


def script(shell: str, commands: Mapping[str, Flags]) -> str:
    """The completion script of a shell.

    Args:
        shell: bash, zsh or fish.
        commands: name -> its flags.
    """
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](commands)


def _bash(commands: Mapping[str, Flags]) -> str:
    flags = "\n".join(f'        {name}) words="{" ".join(its)}" ;;' for name, its in commands.items())
    values = "\n".join(
        f'        "{name} {flag}") words="{" ".join(words)}" ;;'
        for name, its in commands.items()
        for flag, words in its.items()
        if words
    )
    return f"""\
_megatron_rmipo() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
    COMPREPLY=()
    if [[ $COMP_CWORD -eq 1 ]]; then
        COMPREPLY=($(compgen -W "{" ".join(commands)}" -- "$current"))
        return
    fi
    case "${{COMP_WORDS[1]}} $before" in
{values}
    esac
    if [[ -z $words && $current == -* ]]; then
        case "${{COMP_WORDS[1]}}" in
{flags}
        esac
    fi
    if [[ -n $words ]]; then COMPREPLY=($(compgen -W "$words" -- "$current")); fi
}}
# Where nothing is known, files.
complete -o default -F _megatron_rmipo megatron-rmipo"""


def _zsh(commands: Mapping[str, Flags]) -> str:
    # zsh runs completions of bash.
    return f"autoload -Uz bashcompinit && bashcompinit\n{_bash(commands)}"


def _fish(commands: Mapping[str, Flags]) -> str:
    complete = "complete -c megatron-rmipo"
    lines = [f"{complete} -n __fish_use_subcommand -f -a {name} -d '{SUBCOMMANDS[name][1]}'" for name in commands]
    for name, flags in commands.items():
        of_command = f"{complete} -n '__fish_seen_subcommand_from {name}'"
        lines += [
            f"{of_command} -l {flag.removeprefix('--')}" + (f" -x -a '{' '.join(words)}'" if words else "")
            for flag, words in flags.items()
        ]
    return "\n".join(lines)
