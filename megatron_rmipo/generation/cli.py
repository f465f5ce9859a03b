"""Command line of ``tools/generate_answers.py``: a model's answers to a benchmark, in the form its judge reads."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rmipo.command import add_debug_flag, number, run_command, whole_number
from megatron_rmipo.errors import ConfigError
from megatron_rmipo.evaluation_file import Evaluation, write_evaluation
from megatron_rmipo.generation.answer_files import answers_path, write_answers
from megatron_rmipo.generation.answering import answer_questions, check_prompts_fit, length_table
from megatron_rmipo.generation.engines import ENGINES, build_engine, choose_engine
from megatron_rmipo.generation.judge_commands import judge_commands
from megatron_rmipo.generation.kept_records import KeptRecords
from megatron_rmipo.generation.prompts import Prompts
from megatron_rmipo.generation.questions import BENCHMARKS, Question, read_questions
from megatron_rmipo.generation.sampling import MAX_TOKENS, PRESETS, Sampling

_DESCRIPTION = (
    "Answer the questions of a benchmark with one model or several, in the form that the benchmark's judge reads, and print the "
    "judge's commands. Each answer is kept as soon as it is there: a command that was killed goes on where it stood."
)


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(prog="generate_answers.py", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "--model",
        nargs="+",
        required=True,
        metavar="[NAME=]DIR",
        help="Hugging Face model directories; NAME is how the judge calls the model (default: the directory's name)",
    )
    parser.add_argument("--benchmark", choices=BENCHMARKS, required=True, help="whose form the questions and the answers have")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="the benchmark's questions, or your own")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the answers go to DIR/NAME.json or .jsonl")
    parser.add_argument("--limit", type=whole_number(1), metavar="N", help="the first N questions alone")
    _add_sampling(parser)
    _add_engine(parser)
    parser.add_argument(
        "--print-judge-commands", action="store_true", help="print the judge's commands of answers that are there, and no more"
    )
    add_debug_flag(parser)
    return parser


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    presets = ", ".join(f"{name} {value}" for name, value in PRESETS.items())
    parser.add_argument("--preset", choices=tuple(PRESETS), help=f"the paper's temperature for AlpacaEval 2 ({presets})")
    parser.add_argument("--temperature", type=number(), metavar="T", help="0 is greedy (default: MT-Bench's by category; else 0)")
    parser.add_argument(
        "--top-p", type=number(1.0, with_zero=False), default=1.0, metavar="P", help="nucleus of sampling (default: %(default)s)"
    )
    parser.add_argument(
        "--max-tokens", type=whole_number(1), metavar="N", help="of an answer (default: 4096; MT-Bench and your own prompts 1024)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of sampling; an answer does not depend on the batch (1234)")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine", choices=ENGINES, default="auto", help="auto: vllm where it is installed (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="of the model (default: bf16 on a GPU, else fp32)")
    parser.add_argument(
        "--batch-size", type=whole_number(1), metavar="N", help="answers at once (default: transformers 8, vllm 256)"
    )
    parser.add_argument("--tensor-model-parallel-size", type=whole_number(1), default=1, metavar="N", help="GPUs of vllm (1)")
    parser.add_argument(
        "--chat-template", metavar="NAME|FILE", help="as that of preprocess_preferences.py (default: the tokenizer's own)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Answer; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(
        lambda: _generate(arguments),
        debug=arguments.debug,
        interrupted="interrupted; the answers so far are kept, start again to go on",
    )


def _generate(arguments: argparse.Namespace) -> None:
    models = _named_models(arguments.model)
    if arguments.print_judge_commands:
        print(judge_commands(arguments.benchmark, arguments.output, list(models)))
        return
    sampling = _sampling(arguments)
    questions = read_questions(arguments.prompts, arguments.benchmark)[: arguments.limit]
    prepared = {name: Prompts(model, arguments.chat_template) for name, model in models.items()}
    for prompts in prepared.values():
        check_prompts_fit(questions, prompts)
    for name, prompts in prepared.items():
        _answer_with(name, models[name], prompts, questions, sampling, arguments)
    print(judge_commands(arguments.benchmark, arguments.output, list(models)))


def _named_models(given: Sequence[str]) -> dict[str, Path]:
    models: dict[str, Path] = {}
    for text in given:
        name, _, directory = text.rpartition("=")
        path = Path(directory).expanduser()
        name = name or path.resolve().name
        if not name or "/" in name:
            raise ConfigError(f"--model {text}: {name!r} cannot be the name of a file; write NAME=DIR.")
        if name in models:
            raise ConfigError(f"--model: two models are called {name}; give each a name of its own, NAME=DIR.")
        models[name] = path
    return models


def _sampling(arguments: argparse.Namespace) -> Sampling:
    if arguments.preset is not None and arguments.temperature is not None:
        raise ConfigError(f"--preset {arguments.preset} and --temperature {arguments.temperature:g}: give one of them.")
    temperature = PRESETS[arguments.preset] if arguments.preset is not None else arguments.temperature
    if temperature is None and arguments.benchmark != "mt_bench":
        temperature = 0.0
    return Sampling(temperature, arguments.top_p, arguments.max_tokens or MAX_TOKENS[arguments.benchmark], arguments.seed)


def _answer_with(
    name: str, model: Path, prompts: Prompts, questions: Sequence[Question], sampling: Sampling, arguments: argparse.Namespace
) -> None:
    engine_name = choose_engine(arguments.engine)
    dtype = arguments.dtype or _usual_dtype()
    path = answers_path(arguments.output, name, arguments.benchmark)
    settings = {
        "model": str(model.resolve()),
        "files of the model": _digest_of_files(model),
        "prompts": _digest(repr([(question.key, question.opening, question.further) for question in questions])),
        "number of prompts": len(questions),
        "chat template": prompts.template_digest[:16],
        "benchmark": arguments.benchmark,
        "engine": engine_name,
        "dtype": dtype,
        **dataclasses.asdict(sampling),
    }
    with KeptRecords(arguments.output / f"{name}.kept", settings) as kept:
        if any(question.key not in kept.records for question in questions):
            engine = build_engine(
                engine_name,
                model,
                prompts.end_ids,
                dtype=dtype,
                batch_size=arguments.batch_size,
                tensor_model_parallel_size=arguments.tensor_model_parallel_size,
            )
            answer_questions(questions, prompts, engine, sampling, kept)
        turns = {key: record["turns"] for key, record in kept.records.items()}
        title = f"Lengths of answers to {arguments.benchmark}"
        table = length_table(title, questions, kept.records)
        evaluation = Evaluation("generate_answers", title, name, [table], {"settings": settings, "answers": str(path)})
        write_evaluation(arguments.output / f"{name}.evaluation.json", evaluation)
        write_answers(path, arguments.benchmark, name, questions, turns)
    print(f"wrote {path}")


def _usual_dtype() -> str:
    import torch

    return "bf16" if torch.cuda.is_available() else "fp32"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _digest_of_files(model: Path) -> str:
    """Knows a model again: by contents where files are small, by size and time where they are weights."""
    files: list[Any] = []
    for path in sorted(model.glob("*")):
        if path.suffix == ".json":
            files.append((path.name, hashlib.sha256(path.read_bytes()).hexdigest()))
        elif path.suffix == ".safetensors":
            files.append((path.name, path.stat().st_size, path.stat().st_mtime_ns))
    return _digest(repr(files))
