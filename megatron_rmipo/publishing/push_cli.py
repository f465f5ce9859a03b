"""Command line of ``tools/push_to_hub.py``: an exported model or adapter to the Hugging Face Hub."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rmipo.command import add_debug_flag, run_command
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.publishing.exported import Exported, read_export

_DESCRIPTION = """\
Send a model that --save-hf or convert_megatron_to_hf.py wrote, or an adapter that --save-adapter wrote, to the Hugging Face
Hub. Without --yes it says what would be sent, and sends nothing. The token is read from HF_TOKEN."""
_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_SHOWN_LINES = 60


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(prog="push_to_hub.py", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("directory", type=Path, metavar="DIR", help="the exported model or adapter, with its card README.md")
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository on the Hub; made where it is missing")
    parser.add_argument("--yes", action="store_true", help="send it")
    parser.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    parser.add_argument("--message", default="Model trained with megatron_rmipo", help="of the commit (default: %(default)s)")
    add_debug_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    flags = build_parser().parse_args(argv)
    return run_command(lambda: push(flags), debug=flags.debug)


def push(flags: argparse.Namespace, api: Any = None) -> None:
    """Say what would be sent, and send it where ``--yes`` is given.

    Args:
        flags: as :func:`build_parser` reads them.
        api: what stands for :class:`huggingface_hub.HfApi`.

    Raises:
        ConfigError: the directory is no whole model or adapter, the repository has no such name, there is no token, or the Hub
            refuses.
    """
    if not _REPO.fullmatch(flags.repo):
        raise ConfigError(f"{flags.repo}: not the name of a repository. Name it as OWNER/NAME, such as my-name/llama3-8b-rmipo.")
    exported = read_export(flags.directory)
    token = os.environ.get("HF_TOKEN", "").strip()
    if flags.yes and not token:
        raise ConfigError(
            "HF_TOKEN is not set. Make a token that may write (https://huggingface.co/settings/tokens) and export it."
        )
    print("\n".join(_describe(exported, flags)))
    if not flags.yes:
        print("\nNothing was sent. --yes sends it.")
        return
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi(token=token)
    try:
        api.create_repo(flags.repo, private=not flags.public, exist_ok=True)
        if flags.revision is not None:
            api.create_branch(flags.repo, branch=flags.revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=flags.repo,
            folder_path=str(flags.directory),
            allow_patterns=[name for name, _ in exported.files],
            revision=flags.revision,
            commit_message=flags.message,
        )
    except (OSError, ValueError) as error:  # the Hub's errors are of requests, which are OSErrors
        raise ConfigError(f"the Hub refused {flags.repo}: {str(error).splitlines()[0]}") from error
    print(f"\nsent: {done.commit_url}")


def _describe(exported: Exported, flags: argparse.Namespace) -> list[str]:
    lines = [f"to https://huggingface.co/{flags.repo}" + (f", branch {flags.revision}" if flags.revision else "")]
    lines += [f"  {size / 1e6:>12,.2f} MB  {name}" for name, size in exported.files]
    lines.append(f"  {sum(size for _, size in exported.files) / 1e6:>12,.2f} MB  in all")
    card = exported.card.splitlines()
    lines += ["", "its card (README.md):", *(f"  {line}" for line in card[:_SHOWN_LINES])]
    if len(card) > _SHOWN_LINES:
        lines.append(f"  and {len(card) - _SHOWN_LINES} more lines")
    missing = [name for name in ("base_model", "datasets", "license") if name not in exported.metadata]
    if missing:
        lines += ["", f"note: the Hub finds no {', no '.join(missing)} at the head of the card; add what you know to README.md"]
    return lines
