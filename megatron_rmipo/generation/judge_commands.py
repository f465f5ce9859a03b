"""The commands that hand answers to a benchmark's own judge, for people to run: they cost money, and need other programs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_rmipo.generation.answer_files import answers_path

_ARENA = {
    # benchmark -> folder of the benchmark, judge
    "arena_hard": ("arena-hard-v0.1", "gpt-4-1106-preview"),
    "arena_hard_v2": ("arena-hard-v2.0", "gpt-4.1"),
}


def judge_commands(benchmark: str, folder: Path, generators: Sequence[str]) -> str:
    """The commands, a line each, with what they need before them as comments.

    Args:
        benchmark: of :data:`megatron_rmipo.generation.questions.BENCHMARKS`.
        folder: where the answers are.
        generators: names of the models that answered.
    """
    paths = [answers_path(folder.absolute(), generator, benchmark) for generator in generators]
    if benchmark == "alpaca_eval":
        lines = _alpaca_eval(paths)
    elif benchmark == "mt_bench":
        lines = _mt_bench(paths, generators)
    elif benchmark in _ARENA:
        lines = _arena_hard(*_ARENA[benchmark], paths, generators)
    else:
        lines = _own(paths)
    return "\n".join(lines)


def _quoted(*words: str | Path) -> str:
    return " ".join(shlex.quote(str(word)) for word in words)


def _alpaca_eval(paths: Sequence[Path]) -> list[str]:
    config = ("--annotators_config", "weighted_alpaca_eval_gpt4_turbo")
    lines = ["# AlpacaEval 2. Needs pip install alpaca-eval==0.6.2, an environment of its own, and OPENAI_API_KEY."]
    for path in paths:
        output = path.with_suffix("")
        lines.append(_quoted("alpaca_eval", "--model_outputs", path, *config, "--output_path", output))
    return lines


def _mt_bench(paths: Sequence[Path], generators: Sequence[str]) -> list[str]:
    lines = [
        "# MT-Bench. Needs git clone https://github.com/lm-sys/FastChat with",
        '# pip install -e ".[model_worker,llm_judge]", and OPENAI_API_KEY. In FastChat/fastchat/llm_judge:',
        "mkdir -p data/mt_bench/model_answer",
        _quoted("cp", *paths, "data/mt_bench/model_answer/"),
        _quoted("python", "gen_judgment.py", "--model-list", *generators, "--parallel", "2"),
        _quoted("python", "show_result.py", "--model-list", *generators),
    ]
    return lines


def _arena_hard(bench: str, judge: str, paths: Sequence[Path], generators: Sequence[str]) -> list[str]:
    answers, settings = f"data/{bench}/model_answer", f"config/{bench}.yaml"
    lines = [
        "# Arena-Hard. Needs git clone https://github.com/lmarena/arena-hard-auto with its requirements, the baseline's answers",
        f"# in data/{bench}, and the judge {judge} in config/api_config.yaml and as judge_model of {settings}. There:",
        f"mkdir -p {answers}",
        _quoted("cp", *paths, answers + "/"),
        f"python utils/add_markdown_info.py --dir {answers} --output-dir {answers}",
    ]
    for generator in generators:
        lines.append(_quoted("sed", "-i", rf"s/^model_list:/&\n  - {generator}/", settings))
    return [
        *lines,
        f"python gen_judgment.py --setting-file {settings} --endpoint-file config/api_config.yaml",
        f"python show_result.py --benchmark {bench} --judge-names {judge} --control-features markdown length",
    ]


def _own(paths: Sequence[Path]) -> list[str]:
    baseline = paths[-1] if len(paths) > 1 else "BASELINE.jsonl"
    judged = paths[:-1] or paths
    return [
        "# Any OpenAI-compatible endpoint, a local one among them:",
        *(
            _quoted("python", "tools/judge_pairwise.py", "--answers", path, "--baseline", baseline)
            + f" --base-url URL --judge-model NAME --output {shlex.quote(str(path.with_suffix('')))}.judged.json"
            for path in judged
        ),
    ]
