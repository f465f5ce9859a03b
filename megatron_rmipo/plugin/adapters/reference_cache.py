"""Log-probs of a reference that ``tools/score_pairs.py`` computed, found by the data that they are of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_rmipo.data.batches.seen import SeenPairs, seen_rows
from megatron_rmipo.data.store.collection import PairCollection
from megatron_rmipo.data.store.reference_scores import PROGRESS_FILE, KeptScores, Kind, ScoreKey, data_fingerprint, open_scores
from megatron_rmipo.data.store.row_set import RowSet
from megatron_rmipo.errors import ConfigError, DataError
from megatron_rmipo.objectives.base import Objective
from megatron_rmipo.runtime.agreement import on_every_rank, on_first_rank
from megatron_rmipo.runtime.groups import ProcessGroups


def attach_cached_scores(pairs: PairCollection, objective: Objective, cache: str | None, groups: ProcessGroups) -> None:
    """Give pairs the log-probs under the reference that the objective reads. All ranks call it together.

    Args:
        pairs: get them; their mismatched pairs are made before, where they are needed.
        objective: what is trained.
        cache: the directory that ``tools/score_pairs.py`` was given as ``--reference-cache``; None: beside the data.
        groups: the process groups of this rank.

    Raises:
        ConfigError: there are none, or those of several references.
        DataError: they are damaged.
    """
    for kind, part in pairs.read_under_reference(matched=objective.needs.reference):
        places = on_first_rank(groups.world, partial(_find_all, part, kind, objective.name, cache))
        part.reference_scores = on_every_rank(groups.world, partial(_open_all, part, places))


def has_cached_scores(pairs: PairCollection) -> bool:
    """Whether log-probs of any reference lie beside one of the data sets. No communication."""
    return any(next(Path(f"{store.prefix}.reference").glob(f"*/{PROGRESS_FILE}"), None) for store in pairs.stores)


def _find_all(pairs: PairCollection, kind: Kind, objective: str, cache: str | None) -> list[tuple[Path, ScoreKey]]:
    """Of each data set; refuses scores that are not there of a pair."""
    places = [_find(store.prefix, kind, objective, cache) for store in pairs.stores]
    needed: dict[str, RowSet] = {}
    for store, scores in zip(pairs.stores, _open_all(pairs, places), strict=True):
        missing = scores.unscored()
        if len(missing):
            needed = needed or seen_rows([SeenPairs.first(pairs)])
            missing &= needed[store.prefix]
        if len(missing):
            raise ConfigError(
                f"{scores.directory}: the log-probs of {store.prefix} are not all there yet, {len(missing)} of {len(store)} are "
                "missing. Run tools/score_pairs.py to its end."
            )
    return places


def _open_all(pairs: PairCollection, places: Sequence[tuple[Path, ScoreKey]]) -> list[KeptScores]:
    return [_open(*place, store) for place, store in zip(places, pairs.stores, strict=True)]


def _find(prefix: str, kind: Kind, objective: str, cache: str | None) -> tuple[Path, ScoreKey]:
    """Where the scores of a data set lie, and what they depend on."""
    root = Path(f"{prefix}.reference" if cache is None else cache)
    data, found = data_fingerprint(prefix, cache), []
    for path in sorted(root.glob(f"{kind}-*/{PROGRESS_FILE}")):
        key = _read_key(path)
        if key.data == data:
            found.append((path.parent, key))
    if len(found) == 1:
        return found[0]
    option = " --mismatched" if kind == "mismatched" else ""
    if not found:
        raise ConfigError(
            f"objective {objective} compares with a reference, and {root} holds no log-probs of {prefix} under one. Compute "
            f"them: python tools/score_pairs.py --pairs {prefix}{option} --load-hf REFERENCE --reference-cache {root}"
        )
    listed = "\n".join(f"  {directory}: reference {key.reference[:12]}, {key.dtype}" for directory, key in found)
    raise ConfigError(
        f"{root} holds log-probs of {prefix} under several references; which is meant?\n{listed}\n"
        "Set reference_cache to a directory with those of one."
    )


def _read_key(path: Path) -> ScoreKey:
    try:
        return ScoreKey(**json.loads(path.read_text(encoding="utf-8"))["key"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not readable ({error!r}). Remove {path.parent}, and compute it again.") from None


def _open(directory: Path, key: ScoreKey, store: Any) -> KeptScores:
    scores = open_scores(directory, key, len(store))
    if scores is None:
        raise ConfigError(f"{directory}: not there. Is it on a disk that all nodes share?")
    return scores
