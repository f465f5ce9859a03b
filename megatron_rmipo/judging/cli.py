"""Command line of ``tools/judge_pairwise.py``: win rates of a model over a baseline, by a judge behind an endpoint."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rmipo.command import add_debug_flag, number, run_command, whole_number
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.evaluation_file import Evaluation, write_evaluation
from megatron_rmipo.generation.kept_records import KeptRecords
from megatron_rmipo.judging.endpoint import Endpoint
from megatron_rmipo.judging.judgments import Prices, estimate_tokens, judge_all, missing_prompts, spent
from megatron_rmipo.judging.matters import read_matters
from megatron_rmipo.judging.results import format_table, result_table
from megatron_rmipo.judging.verdicts import read_template

_DESCRIPTION = (
    "Have a judge compare the answers of two models, each pair in both orders, and tell the win rate, plain and at equal length. "
    "What it costs is told before. Each verdict is kept at once: a command that was killed goes on where it stood."
)


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(prog="judge_pairwise.py", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "--answers", type=Path, required=True, metavar="FILE", help="of the model; any form of generate_answers.py"
    )
    parser.add_argument(
        "--baseline", type=Path, required=True, metavar="FILE", help="answers to the same questions to compare with"
    )
    parser.add_argument(
        "--questions", type=Path, metavar="FILE", help="the benchmark's questions, where the answers do not hold them"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="the result; verdicts go beside it")
    parser.add_argument("--prompt-template", type=Path, metavar="FILE", help="text with {question}, {answer_a}, {answer_b}")
    _add_endpoint(parser)
    _add_costs(parser)
    add_debug_flag(parser)
    return parser


def _add_endpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base-url", required=True, metavar="URL", help="OpenAI-compatible endpoint, as http://localhost:8000/v1"
    )
    parser.add_argument("--judge-model", required=True, metavar="NAME", help="the judge's name there")
    parser.add_argument(
        "--api-key-variable",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable with the key (default: %(default)s)",
    )
    parser.add_argument("--temperature", type=number(), default=0.0, metavar="T", help="of the judge (default: %(default)s)")
    parser.add_argument(
        "--max-tokens", type=whole_number(1), default=1024, metavar="N", help="of a judgment (default: %(default)s)"
    )
    parser.add_argument(
        "--extra-body", type=_object, default={}, metavar="JSON", help="further fields of a request; null takes one away"
    )
    parser.add_argument(
        "--concurrency", type=whole_number(1), default=8, metavar="N", help="questions asked at once (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout", type=number(with_zero=False), default=120.0, metavar="SECONDS", help="of an attempt (default: %(default)s)"
    )
    parser.add_argument(
        "--num-retries", type=whole_number(0), default=6, metavar="N", help="attempts after the first (default: %(default)s)"
    )


def _add_costs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--price-per-million-input", type=number(), metavar="PRICE", help="of tokens the judge reads")
    parser.add_argument("--price-per-million-output", type=number(), metavar="PRICE", help="of tokens the judge writes")
    parser.add_argument("--max-cost", type=number(), metavar="PRICE", help="go on without asking, and stop once so much is spent")
    parser.add_argument("--yes", action="store_true", help="go on without asking")


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error})") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError("a JSON object is needed")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Judge; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(
        lambda: _judge(arguments),
        debug=arguments.debug,
        interrupted="interrupted; the verdicts so far are kept, start again to go on",
    )


def _judge(arguments: argparse.Namespace) -> None:
    prices = Prices(arguments.price_per_million_input, arguments.price_per_million_output)
    if arguments.max_cost is not None and prices.cost(1, 1) is None:
        raise ConfigError("--max-cost: give --price-per-million-input and --price-per-million-output, too.")
    template = read_template(arguments.prompt_template)
    matters, model, baseline = read_matters(arguments.answers, arguments.baseline, arguments.questions)
    fields = {"temperature": arguments.temperature, "max_tokens": arguments.max_tokens, **arguments.extra_body}
    settings = {
        "base url": arguments.base_url,
        "judge": arguments.judge_model,
        "fields": {name: value for name, value in fields.items() if value is not None},
        "prompt template": _digest(template),
        "answers": _digest(repr(matters)),
    }
    endpoint = Endpoint(
        arguments.base_url,
        arguments.judge_model,
        # Local endpoints want none.
        key=os.environ.get(arguments.api_key_variable) or None,
        fields=settings["fields"],
        timeout_seconds=arguments.timeout,
        num_retries=arguments.num_retries,
    )
    with KeptRecords(arguments.output.with_name(arguments.output.name + ".verdicts.jsonl"), settings) as kept:
        prompts = missing_prompts(matters, template, kept)
        if prompts:
            _consent(list(prompts.values()), prices, arguments)
            how = {"concurrency": arguments.concurrency, "prices": prices, "max_cost": arguments.max_cost}
            judge_all(prompts, endpoint, kept, **how)
        records = kept.records
    title = f"{model} against {baseline}, judged by {arguments.judge_model}"
    table = result_table(title, matters, {name: record["verdict"] for name, record in records.items()})
    cost = spent(records.values(), prices) if prices.cost(1, 1) is not None else None
    details = {"settings": settings, "answers": str(arguments.answers), "baseline": str(arguments.baseline), "cost": cost}
    write_evaluation(arguments.output, Evaluation("judge_pairwise", title, model, [table], details))
    print(format_table(table))
    print(f"wrote {arguments.output}" + (f"; {cost:.4g} spent" if cost is not None else ""))


def _consent(prompts: Sequence[str], prices: Prices, arguments: argparse.Namespace) -> None:
    """Tell what the judgments cost, and ask, unless that was answered by a flag.

    Raises:
        ConfigError: they are not wanted, or nobody is there to ask.
    """
    input_tokens, output_tokens = sum(map(estimate_tokens, prompts)), len(prompts) * arguments.max_tokens
    cost = prices.cost(input_tokens, output_tokens)
    told = f"{len(prompts)} judgments: about {input_tokens:,} tokens to read and at most {output_tokens:,} to write"
    told += f", at most about {cost:.4g}" if cost is not None else " (--price-per-million-input and -output tell what that costs)"
    print(told)
    if arguments.yes or arguments.max_cost is not None:
        return
    if not sys.stdin.isatty():
        raise ConfigError("nothing is asked of the judge yet: give --yes to go on, or a limit with --max-cost.")
    if input("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ConfigError("not wanted: nothing was asked of the judge.")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
