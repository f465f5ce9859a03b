"""Command line of ``tools/inspect_pairs.py``: stored pairs as text, and histograms of their lengths."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_rmipo.command import add_debug_flag, run_command
from megatron_rmipo.data.encoding.tokenize import PreferenceTokenizer, load_tokenizer
from megatron_rmipo.data.store.manifest import length_columns
from megatron_rmipo.data.store.pair_store import PARTS, PairStore
from megatron_rmipo.errors import DataError

BOUNDARY = "\u27e8|\u27e9"
_HISTOGRAM_BINS, _BAR_WIDTH = 12, 40
_SOURCES_SHOWN = 5


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="inspect_pairs.py", description="Show preprocessed pairs as text, and how long they are."
    )
    parser.add_argument("prefix", metavar="PREFIX", help="path of the data set without extension")
    parser.add_argument(
        "number", metavar="N", nargs="?", type=int, default=3, help="how many pairs to show (default: %(default)s)"
    )
    parser.add_argument("--start", type=int, default=0, help="first pair to show, from 0 (default: %(default)s)")
    parser.add_argument("--tokenizer-model", metavar="DIR|FILE|NAME", help="tokenizer (default: the one the data set names)")
    parser.add_argument("--ids", action="store_true", help="show token ids too")
    parser.add_argument(
        "--max-chars", type=int, default=1200, help="show at most so many characters of a text, 0 for all (default: %(default)s)"
    )
    add_debug_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    args = build_parser().parse_args(argv)

    def show() -> None:
        try:
            _inspect(args)
        except BrokenPipeError:  # of a reader that has seen enough, such as `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return run_command(show, debug=args.debug)


def _inspect(args: argparse.Namespace) -> None:
    store = PairStore(args.prefix.removesuffix(".bin").removesuffix(".idx").removesuffix(".json"))
    if args.number < 0 or not 0 <= args.start < len(store):
        raise DataError(f"pairs {args.start} to {args.start + args.number}: {store.prefix} has pairs 0 to {len(store) - 1}.")
    chosen = range(args.start, min(args.start + args.number, len(store)))
    if len(chosen):
        tokenizer = _load_matching_tokenizer(store, args.tokenizer_model)
        print(f"{BOUNDARY} marks the boundary between prompt and response\n")
        for index in chosen:
            print(describe_pair(store, index, tokenizer, max_chars=args.max_chars, with_ids=args.ids), end="\n\n")
    print(describe_store(store))


def _load_matching_tokenizer(store: PairStore, name: str | None) -> PreferenceTokenizer:
    made_with = store.manifest.tokenizer_name
    if not (name or made_with):
        raise DataError(f"{store.prefix}: does not say which tokenizer made it. Pass --tokenizer-model.")
    try:
        tokenizer = load_tokenizer(name or made_with)
    except DataError as error:
        raise DataError(f"{error}\nPass --tokenizer-model if the tokenizer has moved.") if name is None else error from None
    if tokenizer.info != store.manifest.tokenizer:
        raise DataError(
            f"{store.prefix} was made with another tokenizer than {name or made_with}:\n"
            f"  data set:  {store.manifest.tokenizer}\n  tokenizer: {tokenizer.info}\nPass the right one with --tokenizer-model."
        )
    return tokenizer


def describe_pair(
    store: PairStore, index: int, tokenizer: PreferenceTokenizer, *, max_chars: int = 0, with_ids: bool = False
) -> str:
    """A pair, or a row of one response, as text, the boundary between prompt and responses marked."""
    pair = store[index]
    prompt = pair.prompt.tolist()
    text = tokenizer.decode(prompt)
    ids = {name: getattr(pair, name).tolist() for name in PARTS if len(getattr(pair, name))}
    sizes = ", ".join(f"{name} {len(part)}" for name, part in ids.items())
    label = (" (desirable)" if "chosen" in ids else " (undesirable)") if store.manifest.unpaired else ""
    lines = [f"=== {store.manifest.kind.removesuffix('s')} {index}{label}: {sizes} tokens"]
    lines.append(f"--- prompt\n{_ending(text, max_chars)}{BOUNDARY}")
    for name in list(ids)[1:]:
        lines.append(f"--- {name}\n{BOUNDARY}{_beginning(tokenizer.decode_continuation(prompt, ids[name]), max_chars)}")
    if len(store.values[index]):
        beside = zip(store.manifest.pair_columns, store.values[index].tolist(), strict=True)
        lines.append(", ".join(f"{column} {value:g}" for column, value in beside))
    if with_ids:
        lines += [f"{name} ids: {' '.join(map(str, part))}" for name, part in ids.items()]
    return "\n".join(lines)


def _beginning(text: str, max_chars: int) -> str:
    if not max_chars or len(text) <= max_chars:
        return text
    return (
        f"{text[: max_chars - max_chars // 4]} [... {len(text) - max_chars} characters ...] {text[len(text) - max_chars // 4 :]}"
    )


def _ending(text: str, max_chars: int) -> str:
    if not max_chars or len(text) <= max_chars:
        return text
    head, tail = max_chars // 4, max_chars - max_chars // 4
    return f"{text[:head]} [... {len(text) - max_chars} characters ...] {text[len(text) - tail :]}"


def describe_store(store: PairStore) -> str:
    """Where the data set comes from, what was left out, and histograms of its lengths."""
    manifest = store.manifest
    counts = ", ".join(f"{name} {count}" for name, count in manifest.counts.items())
    more = f" and {len(manifest.sources) - _SOURCES_SHOWN} more" if len(manifest.sources) > _SOURCES_SHOWN else ""
    template = manifest.template_name + (f" as of {manifest.template_date}" if manifest.template_date else "")
    lines = [
        f"{store.prefix}: {len(store)} {manifest.kind}, {manifest.num_tokens} tokens",
        f"  from {', '.join(map(_describe_source, manifest.sources[:_SOURCES_SHOWN]))}{more} (format {manifest.format})",
        f"  rows: {counts}",
        f"  tokenizer {manifest.tokenizer_name} ({manifest.tokenizer.vocab_size} tokens), template {template}",
        f"  at most {manifest.seq_length} tokens, longer ones: {manifest.overlong}",
    ]
    of_pairs = manifest.has_rejected and not manifest.unpaired
    total = "prompt with the longer response" if of_pairs else "prompt with the response"
    for part, column in length_columns(store.lengths).items():
        name = total if part == "total" else part
        lines += [
            "",
            f"{name}, tokens (mean {column.mean():.0f}, median {np.median(column):.0f}, max {column.max()})",
            histogram(column),
        ]
    return "\n".join(lines)


def _describe_source(source: dict[str, Any]) -> str:
    return f"{source['name']}{source.get('rows', '')}"


def histogram(values: npt.NDArray[np.int32]) -> str:
    """A histogram of positive counts as lines of text, in equal steps up to the largest."""
    step = max(1, -(-int(values.max()) // _HISTOGRAM_BINS))
    edges = np.arange(0, int(values.max()) + step, step)
    heights = np.bincount((values - 1) // step, minlength=len(edges) - 1)
    unit = heights.max() / _BAR_WIDTH
    width = len(str(edges[-1]))
    return "\n".join(
        f"  {edges[i] + 1:>{width}} - {edges[i + 1]:>{width}}  {'#' * round(height / unit):<{_BAR_WIDTH}} {height}"
        for i, height in enumerate(heights)
    )
