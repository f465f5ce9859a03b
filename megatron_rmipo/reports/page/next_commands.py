"""What to do after a run, as commands with its own paths."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path

from megatron_rmipo.reports.page.run_files import PageRun
from megatron_rmipo.reports.reporter import EVALUATIONS_FOLDER

_TRAINER = "megatron_rmipo.train"


@dataclasses.dataclass(frozen=True)
class Command:
    """A command and what it is for."""

    title: str
    text: str


def next_commands(run: PageRun) -> list[Command]:
    """Commands that fit the run: it goes on where it has stopped, else it is used."""
    return [Command(title, shlex.join(words)) for title, words in _commands(run)]


def _commands(run: PageRun) -> Iterator[tuple[str, list[str]]]:
    save, save_hf = run.config.get("save"), run.config.get("save_hf")
    config = str(run.log_dir / "config.yaml")
    if save and not run.is_complete:
        yield "Go on from its latest checkpoint", [*_launcher(run), "--config", config, "--load", save, "--no-finetune"]
    if save_hf and Path(save_hf).is_dir():
        model = save_hf
    else:
        model = save_hf or f"{save}-hf"
        if save:
            yield "Export the latest checkpoint", _tool("convert_megatron_to_hf", "--load", save, "--save-hf", model)
    held_out = run.config.get("valid_data_path") or []
    sets = [f"held-out={held_out[0]}"] if len(held_out) == 1 else []
    sets += run.config.get("eval_data") or []
    if (save or save_hf) and sets:
        flags = ["--data", *sets, "--output", str(run.log_dir / EVALUATIONS_FOLDER / "held_out.json")]
        yield "Evaluate the export without a judge, for this report, too", _tool("evaluate_pairs", "--load-hf", model, *flags)
    if save or save_hf:
        tasks = ["--tasks", "leaderboard", "--batch_size", "auto", "--output_path", str(run.log_dir / "lm_eval")]
        yield "Evaluate the export with lm-eval", ["lm_eval", "--model", "hf", "--model_args", f"pretrained={model}", *tasks]
        if base := run.config.get("load_hf"):
            yield "Put it beside the model that it was made from", ["bash", "examples/evaluate.sh", model, base]
    if save and run.is_complete:
        further = ["--load", save, "--finetune", "--save", f"{save}-2", "--save-hf", f"{model}-2"]
        yield "Train on from its weights, as a new run", [*_launcher(run), "--config", config, *further]
    yield "Summarize it on the screen", _tool("summarize_run", "--log-dir", str(run.log_dir))
    yield "This report anew, beside another run", [*_tool("report", str(run.log_dir)), "OTHER_RUN"]


def _tool(name: str, *flags: str) -> list[str]:
    return ["python", f"tools/{name}.py", *flags]


def _launcher(run: PageRun) -> list[str]:
    """How it was started, up to its flags."""
    starts = run.facts.get("starts") or [{}]
    words = shlex.split(starts[-1].get("command", ""))
    return words[: words.index(_TRAINER) + 1] if _TRAINER in words else ["python", "-m", _TRAINER]
