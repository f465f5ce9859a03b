"""Command line of ``tools/preprocess_preferences.py``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_rmipo.command import add_debug_flag, run_command
from megatron_rmipo.data.encoding.encode import OVERLONG_POLICIES
from megatron_rmipo.data.encoding.jinja import DEFAULT_DATE
from megatron_rmipo.data.encoding.templates import BUILT_IN_TEMPLATES
from megatron_rmipo.data.encoding.tokenize import BOS_POLICIES
from megatron_rmipo.data.layouts.formats import FORMATS
from megatron_rmipo.data.layouts.scores import ON_INVERTED
from megatron_rmipo.data.preparing.preprocess import PreprocessOptions, preprocess
from megatron_rmipo.data.store.pair_store import Manifest

_DESCRIPTION = """\
Turn preference pairs, unpaired rows (one answer with a label) or supervised rows into Megatron's indexed format: PREFIX.bin,
PREFIX.idx and PREFIX.json. Rows that cannot be used are counted by reason and listed in PREFIX.rejects.jsonl."""


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(prog="preprocess_preferences.py", description=_DESCRIPTION, allow_abbrev=False)
    group = parser.add_argument_group("input")
    group.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="FILE|DIR|PATTERN|NAME",
        help="jsonl, json, csv or tsv (also .gz or .zst), parquet or arrow files; directories, with all the data files in them; "
        "quoted patterns such as 'dir/*.jsonl.gz'; Hugging Face data set names",
    )
    group.add_argument(
        "--split",
        help="split of each input, and part of its rows: train, train[:1000], train[10%%:20%%], [-100:] "
        "(default: all of the only one)",
    )
    group.add_argument("--format", choices=tuple(FORMATS), help="format of the rows (default: recognised)")
    group.add_argument(
        "--columns",
        metavar="NAME=COLUMN,...",
        help="column names, or paths to nested values, such as prompt=question,chosen=answers[0].text,rejected=answers.-1.text "
        "or first=a,second=b,winner=c",
    )
    group.add_argument(
        "--ignore-columns",
        metavar="COLUMN,...",
        help="leave out these columns, and the fields of messages that are called so; without it, what would change what is "
        "learned and is not read is refused",
    )
    group.add_argument(
        "--winner-values",
        metavar="first=VALUE,...",
        help="what the values of the winner's column mean, such as first=1,second=2,tie=0",
    )
    group.add_argument("--keep-ties", action="store_true", help="keep pairs whose two scores are equal")
    group.add_argument(
        "--on-inverted",
        choices=ON_INVERTED,
        default=ON_INVERTED[0],
        help="pairs whose chosen answer scores lower: keep and count, drop, swap the answers, or stop (default: %(default)s)",
    )
    group.add_argument("--strict", action="store_true", help="rejected rows are an error, nothing is written")
    group = parser.add_argument_group("tokenizer")
    group.add_argument(
        "--tokenizer-model", required=True, metavar="DIR|FILE|NAME", help="Hugging Face tokenizer, or sentencepiece .model file"
    )
    group.add_argument(
        "--chat-template",
        metavar="NAME|FILE",
        help=f"{', '.join(BUILT_IN_TEMPLATES)}, or a Jinja file (default: the tokenizer's own)",
    )
    group.add_argument(
        "--bos",
        choices=BOS_POLICIES,
        default=BOS_POLICIES[0],
        help="BOS at the prompt's head: as the template has it (built-in ones: once), once, or never (default: %(default)s)",
    )
    group.add_argument(
        "--template-date",
        metavar="YYYY-MM-DD",
        help=f"the date that a template is told which writes today's (default: {DEFAULT_DATE})",
    )
    group = parser.add_argument_group("length")
    group.add_argument(
        "--seq-length", type=int, default=2048, help="most tokens of a prompt with its longer response (default: %(default)s)"
    )
    group.add_argument(
        "--overlong",
        choices=OVERLONG_POLICIES,
        default=OVERLONG_POLICIES[0],
        help="longer pairs: cut the prompt's beginning, drop the pair, stop, or do as the authors' code (default: %(default)s)",
    )
    group.add_argument("--max-prompt-length", type=int, help="prompt's limit, for --overlong official")
    group = parser.add_argument_group("output")
    group.add_argument("--output-prefix", required=True, metavar="PREFIX", help="path of the data set without extension")
    group.add_argument("--overwrite", action="store_true", help="replace what stands at the prefix")
    group.add_argument(
        "--workers", type=int, default=1, help="worker processes; the result does not depend on it (default: %(default)s)"
    )
    group.add_argument(
        "--log-interval", type=int, default=1000, help="rows between two progress lines off a terminal (default: %(default)s)"
    )
    add_debug_flag(parser)
    return parser


def summary(manifest: Manifest, prefix: str) -> str:
    """What was written, in a few lines."""
    counts = manifest.counts
    lines = [
        f"{prefix}: {manifest.num_pairs} {manifest.kind}, {manifest.num_tokens} tokens, from {counts['rows']} rows "
        f"(format {manifest.format}, template {manifest.template_name})",
    ]
    if manifest.unpaired:
        lines.append(f"  {counts['desirable']} desirable (label true), {counts['undesirable']} undesirable (label false)")
    rejected = [f"{count} {name.removeprefix('rejected/')}" for name, count in counts.items() if name.startswith("rejected/")]
    if rejected:
        lines.append(f"  rejected {counts['rejected']}: {', '.join(rejected)}; listed in {prefix}.rejects.jsonl")
    if counts.get("inverted"):
        done = "answers swapped" if manifest.on_inverted == "swap" else "kept (see --on-inverted)"
        lines.append(f"  {counts['inverted']} with a chosen answer that scores lower than the rejected one: {done}")
    if manifest.unread_columns:
        lines.append(f"  not read: {', '.join(manifest.unread_columns)}")
    if counts["truncated"]:
        lines.append(f"  {counts['truncated']} longer than {manifest.seq_length} tokens were shortened ({manifest.overlong})")
    if left_out := counts.get("left_out"):
        lines.append(
            f"  of {left_out} the template left out something an assistant's turn holds, such as reasoning; see docs/data.md"
        )
    for name, values in manifest.lengths.items():
        shown = ", ".join(f"{key} {values[key]:g}" for key in ("mean", "p50", "p95", "max"))
        lines.append(f"  {name + ' tokens:':<17} {shown}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    flags = vars(build_parser().parse_args(argv))
    debug = flags.pop("debug")

    def prepare() -> None:
        options = PreprocessOptions(**{**flags, "input": tuple(flags["input"])})
        print(summary(preprocess(options), options.output_prefix))

    return run_command(prepare, debug=debug, interrupted="interrupted; nothing was written")
