"""``run.json``: what a run is that its flags do not say, written as it starts: versions, commit, model, layout, data."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import megatron_rmipo
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.manifest import PARTS, Manifest
from megatron_rmipo.reports.reporter import FACTS_FILE
from megatron_rmipo.torchrun import Launch
from megatron_rmipo.whole_files import replace_file

_BINS = 24
# Of longer data the first so many pairs are counted: a few seconds' work.
_MOST_COUNTED = 2_000_000
_MANIFEST_FIELDS = (
    *("tokenizer_name", "template_name", "template_date", "bos", "seq_length", "overlong", "format", "on_inverted", "sources"),
    *("counts", "unread_columns", "pair_columns", "num_pairs", "num_tokens", "lengths"),
)


def write_facts(log_dir: Path, facts: Mapping[str, Any], start: Mapping[str, Any]) -> None:
    """Write the file, in place of the one before; a run that goes on adds a start to those before.

    Args:
        log_dir: of the run.
        facts: what the run is, of plain types.
        start: when and from where: ``time`` (ISO), ``step``, ``command``.

    Raises:
        OSError: it cannot be written.
    """
    earlier = read_facts(log_dir).get("starts", []) if start["step"] else []
    _write(log_dir, {**facts, "starts": [*earlier, dict(start)]})


def add_facts(log_dir: Path, facts: Mapping[str, Any]) -> None:
    """Add to the file what a run is known by at its end only.

    Raises:
        OSError: it cannot be written.
    """
    _write(log_dir, {**read_facts(log_dir), **facts})


def _write(log_dir: Path, facts: Mapping[str, Any]) -> None:
    replace_file(log_dir / FACTS_FILE, [json.dumps(facts, indent=1) + "\n"])


def read_facts(log_dir: Path) -> dict[str, Any]:
    """What the file says; empty where there is none, or none that can be read: runs of an earlier version have none."""
    try:
        facts = json.loads((log_dir / FACTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def data_facts(pairs: PairCollection) -> dict[str, Any]:
    """What a run reads of prepared data: how many pairs, of which data sets, and how long they are.

    Returns:
        ``pairs``; ``sets``, of each data set its prefix and what its manifest says; ``histograms``, see :func:`histograms`.
    """
    return {
        "pairs": len(pairs),
        "sets": [{"prefix": str(store.prefix), **_of_manifest(store.manifest)} for store in pairs.stores],
        "histograms": histograms(pairs),
    }


def _of_manifest(manifest: Manifest) -> dict[str, Any]:
    return {"kind": manifest.kind, **{name: getattr(manifest, name) for name in _MANIFEST_FIELDS}}


def histograms(pairs: PairCollection) -> dict[str, Any]:
    """Of prompts and of each kind of response how many have how many tokens, in equal steps up to the longest of all.

    Returns:
        ``step``: tokens of a bin, the first of which begins at one token; ``counted``: pairs; and a list of counts for each part
        that any pair has.
    """
    counted = min(len(pairs), _MOST_COUNTED)
    lengths = [part for _, part in pairs.all_lengths(counted)]
    longest = max((int(part.max()) for part in lengths if part.size), default=1)
    step = max(1, -(-longest // _BINS))
    found: dict[str, Any] = {"step": step, "counted": counted}
    for number, name in enumerate(PARTS):
        counts = np.zeros(-(-longest // step) or 1, dtype=np.int64)
        for part in lengths:
            column = part[:, number]
            counts += np.bincount((column[column > 0] - 1) // step, minlength=len(counts))
        if counts.any():
            found[name] = counts.tolist()
    return found


def commit_of_package() -> str | None:
    """The commit of the working tree that this package lies in, with a word where files of it were changed; None elsewhere."""
    root = Path(megatron_rmipo.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    commit, changes = (_git(root, *words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")))
    return commit and commit + (" with changes" if changes else "")


def _git(root: Path, *words: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def launcher_words(launch: Launch) -> list[str]:
    """The command that started the trainer on these ranks, up to its flags."""
    if launch.world_size == 1:
        return ["python", "-m", "megatron_rmipo.train"]
    nodes = max(1, launch.world_size // launch.local_world_size)
    several = ["--nnodes", str(nodes)] if nodes > 1 else []
    return ["torchrun", *several, "--nproc-per-node", str(launch.local_world_size), "-m", "megatron_rmipo.train"]
