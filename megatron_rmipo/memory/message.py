"""What :mod:`megatron_rmipo.memory.report` found, in words: at most a screen, the first line enough by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Pairs of a pack that are named; the file names all.
_NAMED = 5
_WORDS = {"in_use": "in use by tensors", "reserved": "reserved by torch", "free": "free", "total": "in all"}


def first_line(record: Mapping[str, Any]) -> str:
    """Where memory ran out."""
    if "pack" not in record:
        return f"{record['when']}: out of memory{' outside the passes over packs' if record['has_packs'] else ''}."
    pack = record["pack"]
    longest = max(pack["pairs"], key=lambda pair: pair["tokens"], default=None)
    named = f"; the longest, {longest['pair']}, {longest['tokens']} tokens" if longest is not None else ""
    return (
        f"{record['when']}: out of memory in the {record['in']} of the {record['pass']}, pack {pack['number']} of {pack['of']} "
        f"of this rank: {pack['tokens']} tokens, {pack['scored_tokens']} of them scored, {len(pack['pairs'])} pairs{named}."
    )


def further_lines(record: Mapping[str, Any]) -> list[str]:
    """What torch said, how much memory there was and was needed, and what would have fitted."""
    lines = [
        f"torch: {record['error']}",
        _memory_line(record["memory"], "free without the pack" if "pack" in record else "free afterwards"),
    ]
    fragments = _fragments_line(record["memory"])
    lines += [fragments] if fragments else []
    standing = ", ".join(f"{name.replace('_', ' ')} {_size(number)}" for name, number in record["standing"].items() if number)
    if "pack" not in record:
        lines.append(f"estimate of what stands: {standing}")
        return [*lines, *_suggestion_lines("would leave more, each line by itself:", record["suggestions"])]
    pack, estimate = record["pack"], record["estimate"]
    names = [pair["pair"] for pair in pack["pairs"]]
    lines.append(f"its pairs: {', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''}")
    held = f" of {record['packs_in_flight']:g} packs at a time" if record["packs_in_flight"] > 1 else ""
    needed = f"activations {_size(estimate['activations'])}{held}" if estimate["activations"] else "no activations are kept"
    more = max(("layer", "head"), key=lambda name: float(estimate[name]))
    words = {"layer": "a layer at work", "head": "the output layer"}
    lines.append(f"estimate of what it needs: {needed}, {words[more]} {_size(estimate[more])}; beside it stand {standing}")
    return [*lines, *_suggestion_lines("would have fitted, each line by itself:", record["suggestions"])]


def _suggestion_lines(title: str, suggestions: list[str]) -> list[str]:
    if not suggestions:
        return [
            "by the estimate nothing fits on these ranks: take more, at a larger --tensor-model-parallel-size, or shorter data"
        ]
    return [title, *(f"  {one}" for one in suggestions)]


def _memory_line(memory: Mapping[str, int | None], afterwards: str) -> str:
    known = [f"{_size(memory[name])} {text}" for name, text in _WORDS.items() if memory[name] is not None]
    asked = [f"asked for {_size(memory['asked'])}"] if memory["asked"] is not None else []
    return "; ".join([*asked, *known, f"{_size(memory['free_without_the_pack'])} {afterwards}"])


def _fragments_line(memory: Mapping[str, int | None]) -> str | None:
    asked, reserved, in_use = memory["asked"], memory["reserved"], memory["in_use"]
    if asked is None or reserved is None or in_use is None or reserved - in_use < asked:
        return None
    return (
        f"{_size(reserved - in_use)} are reserved in pieces that are too small: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True "
        "in the environment may be all it takes"
    )


def _size(number: float | None) -> str:
    assert number is not None
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
