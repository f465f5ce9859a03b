"""How fast preference data are prepared, beside the tokenizer alone, and how long a step waits for its batch.

    python -m benchmarks.bench_data [--lengths ultrafeedback hh] [--input FILE ... --tokenizer DIR] [--check]

Preparing: from rows in a file to a finished data set, in one process, and the tokenizer's own batch encoding of the same texts.
Loading: batches in the trainer's own order, beside a stand-in for the model's step. See README.md beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # Started as a file.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.inputs import RECORDED, cut_lengths, read_lengths
from benchmarks.loading import Loading, measure_loading, save_store
from benchmarks.made_text import make_rows, save_rows, save_tokenizer
from benchmarks.measure import Spread
from benchmarks.preparing import Preparing, measure_preparing
from benchmarks.report import FOLDER, Goal, add_report_options, report
from megatron_rmipo.config.schema import DataConfig
from megatron_rmipo.data.encoding.tokenize import load_tokenizer
from megatron_rmipo.data.preparing.preprocess import PreprocessOptions
from megatron_rmipo.errors import DataError

LEAST_SHARE_OF_BARE_SPEED = 0.9
MOST_WAIT_SHARE = 0.01
GOAL_BATCH_SIZE = 128
PARTS = ("preparing", "loading")


def figures(part: str, result: Preparing | Loading) -> dict[str, Any]:
    """Every figure by its name, of a result of one part."""
    row: dict[str, Any] = {"part": part}
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        spread = dataclasses.asdict(value) if isinstance(value, Spread) else None
        row |= {field.name: value} if spread is None else {f"{field.name}_{name}": x for name, x in spread.items()}
    return row


def load_all(lengths: dict[str, np.ndarray], options: argparse.Namespace, folder: Path) -> list[Loading]:
    """Measure loading of random tokens of each of the lengths."""
    stores = {source: save_store(folder / f"store{i}", sizes, options.seed) for i, (source, sizes) in enumerate(lengths.items())}
    return [measure_loading(source, store, options) for source, store in stores.items()]


def prepare_all(lengths: dict[str, np.ndarray], options: argparse.Namespace, folder: Path) -> list[Preparing]:
    """Measure preparing of each input."""
    results = []
    for number, (source, path, directory) in enumerate(inputs(lengths, options, folder)):
        tokenizer = load_tokenizer(directory)
        if isinstance(tokenizer.spec.model, bytes):
            raise DataError(f"--tokenizer {directory}: a bare sentencepiece model. Give a directory with tokenizer.json.")
        job = PreprocessOptions(
            input=(str(path),),
            tokenizer_model=directory,
            output_prefix=str(folder / f"pairs{number}"),
            chat_template=options.chat_template,
            seq_length=options.seq_length,
            overwrite=True,
            log_interval=0,
        )
        results.append(measure_preparing(source, tokenizer, job, options.repeats))
    return results


def inputs(lengths: dict[str, np.ndarray], options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Path, str]]:
    """(name, file of rows, tokenizer): those given, or made for each of the lengths."""
    if options.input:
        yield from ((str(path), path, options.tokenizer) for path in options.input)
        return
    for number, (source, sizes) in enumerate(lengths.items()):
        rows, path, directory = (
            make_rows(source, sizes, options.seed),
            folder / f"rows{number}.jsonl",
            folder / f"tokenizer{number}",
        )
        save_rows(path, rows)
        if options.tokenizer is None:
            save_tokenizer(directory, rows)
        yield source, path, options.tokenizer or str(directory)


def table(preparing: Sequence[Preparing], loading: Sequence[Loading]) -> str:
    """A line per input and one per length file."""
    lines = []
    if preparing:
        columns = {"pairs": 7, "pairs/s": 9, "CPU ms/pair": 13, "bare": 8, "fast": 8, "of bare": 9, "of fast": 9}
        lines.append(f"{'input':<40}" + "".join(f"{name:>{width}}" for name, width in columns.items()))
    for one in preparing:
        ours, bare, fast = (
            1e3 * spread.p50 / one.pairs for spread in (one.cpu_seconds, one.bare_cpu_seconds, one.fast_cpu_seconds)
        )
        lines.append(
            f"{one.source[-39:]:<40}{one.pairs:>7}{1e3 / ours:>9.0f}{ours:>13.3f}{bare:>8.3f}{fast:>8.3f}"
            f"{one.share.p50:>9.3f}{one.fast_share.p50:>9.3f}"
        )
    if loading:
        columns = {"ranks": 6, "build CPU ms": 14, "own CPU ms": 12, "step ms": 9, "first ms": 10, "wait ms": 9, "share": 9}
        lines.append(f"{'lengths':<16}" + "".join(f"{name:>{width}}" for name, width in columns.items()))
    for two in loading:
        lines.append(
            f"{two.source[-15:]:<16}{two.ranks:>6}{two.build_cpu_ms.p50:>14.2f}{two.own_cpu_ms.p50:>12.2f}"
            f"{two.step_ms.p50:>9.1f}{two.first_ms:>10.1f}{two.wait_ms.p50:>9.2f}{two.share:>9.4f}"
        )
    return "\n".join(lines)


def goals(options: argparse.Namespace, preparing: Sequence[Preparing], loading: Sequence[Loading]) -> list[Goal]:
    """The tokenizer's speed by CPU time, for any input; waits for batches of 128 pairs, prepared ahead."""
    held = []
    for one in preparing:
        title = f"preparing, {Path(one.source).name}: share of the speed of"
        held.append(Goal(f"{title} encode_batch", LEAST_SHARE_OF_BARE_SPEED, one.share.p50, True))
        held.append(Goal(f"{title} encode_batch_fast", LEAST_SHARE_OF_BARE_SPEED, one.fast_share.p50, True))
    if options.batch_size == GOAL_BATCH_SIZE and options.num_workers:
        held += [Goal(f"loading, {one.source}: share of time waited", MOST_WAIT_SHARE, one.share) for one in loading]
    return held


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_data", allow_abbrev=False, description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--lengths", nargs="+", default=list(RECORDED), help="recorded lengths or files, as of bench_step (default: %(default)s)"
    )
    parser.add_argument("--input", nargs="+", type=Path, default=[], help="files of rows to prepare, instead of made text")
    parser.add_argument("--tokenizer", help="directory with tokenizer.json (default: trained on the made text)")
    parser.add_argument("--chat-template", help="as of preprocess_preferences.py (default: the tokenizer's own)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default: both)")
    for name, default, meaning in (
        ("repeats", 5, "times to prepare each input"),
        ("ranks", 8, "data-parallel ranks that share a batch"),
        ("batch-size", GOAL_BATCH_SIZE, "pairs of a global batch"),
        ("num-batches", 20, "batches to load, after a first one"),
        ("num-workers", DataConfig().num_workers, "processes that prepare batches ahead"),
        ("seq-length", 2048, "most tokens of a prompt with its longer response"),
        ("seed", 1, "of made text, random tokens and the order of pairs"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default: %(default)s)")
    add_report_options(parser, FOLDER / "results_data.csv")
    options = parser.parse_args(argv)
    if options.input and not options.tokenizer:
        parser.error("--input needs --tokenizer")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, show, append."""
    options = parse_options(argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for both sides
    lengths = {source: cut_lengths(read_lengths(source), options.seq_length) for source in options.lengths}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Loading first: its workers are forked before any tokenizer has run.
        loading = load_all(lengths, options, folder) if "loading" in options.parts else []
        preparing = prepare_all(lengths, options, folder) if "preparing" in options.parts else []
    settings = {name: getattr(options, name) for name in ("chat_template", "batch_size", "num_batches", "seq_length", "seed")}
    rows = [settings | figures("preparing", one) for one in preparing] + [settings | figures("loading", one) for one in loading]
    return report(options, "data", table(preparing, loading), rows, goals(options, preparing, loading))


if __name__ == "__main__":
    sys.exit(main())
