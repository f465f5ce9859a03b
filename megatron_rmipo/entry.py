"""Where every command starts: before anything large is imported, so that this ends well, too, and quietly.

Understood by older Pythons, which are told that they are too old.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

from megatron_rmipo.command import DONE, FAULT_OF_OURS, FAULT_OF_USER, INTERRUPTED, STOPPED
from megatron_rmipo.errors import RmipoError
from megatron_rmipo.remote_paths import flags_and_values, refuse_remote_paths
from megatron_rmipo.torchrun import ENDS_VARIABLE, launch_for_messages

OLDEST_PYTHON = (3, 11)
# What a command cannot do without, imported as.
NEEDED = ("torch", "megatron.core", "transformers", "datasets", "safetensors", "psutil", "numpy", "yaml")


def start(module: str, *, on_ranks: bool = False, address_flags: tuple[str, ...] = ()) -> int:
    """Import a command and run its ``main``.

    Warnings of other packages, and what they log at import, are off the screen unless ``--debug``, -W or PYTHONWARNINGS ask for
    them.

    Args:
        module: has ``main() -> int``.
        on_ranks: it runs on several ranks. A signal ends it at once, even within a collective, until it handles signals itself.
        address_flags: those whose values are addresses, which in the place of a path are refused.

    Returns:
        The exit code, see docs/training.md.
    """
    if "--debug" not in sys.argv and not sys.warnoptions:
        warnings.simplefilter("ignore")
        os.environ["PYTHONWARNINGS"] = "ignore"  # for the processes it starts
        # Of torch's C++ side: pages of frames for every retry of a connection.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        # It tells, on every rank and in processes of theirs, of a CUDA toolkit without a GPU.
        os.environ.setdefault("TORCH_LOGS", "-torch.utils.cpp_extension")
    if on_ranks:
        _forget_earlier_end()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    else:
        # As Ctrl-C: what is half done is removed.
        signal.signal(signal.SIGTERM, _as_interrupt)
    code = _run(module, address_flags)
    return _leave_end(code) if on_ranks else code


def _as_interrupt(number: int, frame: object) -> None:
    # Slurm and a script may both send it: the second one must not break the clean-up off.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _run(module: str, address_flags: tuple[str, ...]) -> int:
    try:
        check_installation()
        refuse_remote_paths((flag, value) for flag, value in flags_and_values(sys.argv[1:]) if flag not in address_flags)
        code: int = importlib.import_module(module).main()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as end:  # of argparse, whose 2 is a fault of the user
        return DONE if end.code in (None, 0) else FAULT_OF_USER
    except RmipoError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        else:
            print(f"error: {error}", file=sys.stderr)
        return FAULT_OF_USER
    except Exception:
        traceback.print_exc()
        return FAULT_OF_OURS


def check_installation() -> None:
    """Refuse an interpreter that is too old or lacks a package; imports none of them.

    Raises:
        RmipoError: with the remedy.
    """
    remedy = "Run 'make venv' and 'source .venv/bin/activate', or activate the environment that this project is installed in."
    if sys.version_info < OLDEST_PYTHON:
        oldest, found = ".".join(map(str, OLDEST_PYTHON)), ".".join(map(str, sys.version_info[:2]))
        raise RmipoError(f"Python {oldest} or later is needed, and {sys.executable} is Python {found}. {remedy}")
    missing = [name for name in NEEDED if not _is_there(name)]
    if missing:
        raise RmipoError(f"missing in the environment of {sys.executable}: {', '.join(missing)}. {remedy}")


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that holds it
        return False


def _end_file() -> Path | None:
    directory = os.environ.get(ENDS_VARIABLE)
    return None if directory is None else Path(directory, str(launch_for_messages().local_rank))


def _forget_earlier_end() -> None:
    """Where torchrun has started the ranks anew, how they ended before is not how they end."""
    path = _end_file()
    if path is not None:
        path.unlink(missing_ok=True)


def _leave_end(code: int) -> int:
    """Tell the launcher how this rank ended; without one the exit code has to say it.

    torchrun ends the ranks beside one that exits with another code than 0, and would take a stop for a failure.
    """
    # From here on a signal changes nothing.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    path = _end_file()
    if path is None:
        return code
    path.write_text(f"{time.time()} {code}", encoding="utf-8")
    return DONE if code == STOPPED else code


def main() -> int:
    """Check the environment and do nothing else."""
    return DONE


train = functools.partial(start, "megatron_rmipo.training.main", on_ranks=True)
score_pairs = functools.partial(start, "megatron_rmipo.scoring.score_cli", on_ranks=True)
evaluate_pairs = functools.partial(start, "megatron_rmipo.evaluation.cli", on_ranks=True)
verify_conversion = functools.partial(start, "megatron_rmipo.checkpoint.verify_cli", on_ranks=True)
launch = functools.partial(start, "megatron_rmipo.runtime.launcher")
preprocess_preferences = functools.partial(start, "megatron_rmipo.data.preparing.preprocess_cli")
inspect_pairs = functools.partial(start, "megatron_rmipo.data.preparing.inspect_cli")
plan_layout = functools.partial(start, "megatron_rmipo.planning.cli")
verify_checkpoint = functools.partial(start, "megatron_rmipo.checkpoint.verify_checkpoint_cli")
convert_hf_to_megatron = functools.partial(start, "megatron_rmipo.checkpoint.hf_to_megatron_cli")
convert_megatron_to_hf = functools.partial(start, "megatron_rmipo.checkpoint.megatron_to_hf_cli")
merge_adapter = functools.partial(start, "megatron_rmipo.checkpoint.merging.cli")
make_inputs = functools.partial(start, "megatron_rmipo.embedded.generate")
summarize_run = functools.partial(start, "megatron_rmipo.reports.summary_cli")
report = functools.partial(start, "megatron_rmipo.reports.page.cli")
stage_record = functools.partial(start, "megatron_rmipo.stage_record")
generate_answers = functools.partial(start, "megatron_rmipo.generation.cli")
judge_pairwise = functools.partial(start, "megatron_rmipo.judging.cli", address_flags=("--base-url",))
compare_evaluations = functools.partial(start, "megatron_rmipo.judging.compare_cli")
compare_runs = functools.partial(start, "megatron_rmipo.reports.comparison_cli")
plot_runs = functools.partial(start, "megatron_rmipo.reports.plots_cli")
push_to_hub = functools.partial(start, "megatron_rmipo.publishing.push_cli")
doctor = functools.partial(start, "megatron_rmipo.doctor.cli")
completion = functools.partial(start, "megatron_rmipo.completion")

# Subcommand of megatron-rmipo -> what it starts, and what that does. In the order in which people need them.
SUBCOMMANDS = {
    "doctor": (doctor, "say whether this machine is fit: versions, GPUs, kernels against their references, ranks"),
    "preprocess": (preprocess_preferences, "preference data of any form -> token ids"),
    "inspect-pairs": (inspect_pairs, "show prepared pairs as text"),
    "plan-layout": (plan_layout, "which layout of a model on some machines fits and is fastest"),
    "train": (train, "train as one rank; several are started by launch"),
    "launch": (launch, "start ranks as torchrun does: launch --nproc-per-node 8 -m megatron_rmipo.train ..."),
    "score-pairs": (score_pairs, "log-probs of prepared pairs under a reference"),
    "summarize-run": (summarize_run, "what a run did to its held-out pairs"),
    "evaluate-pairs": (evaluate_pairs, "how often a model's log-probs prefer the better of two answers"),
    "generate-answers": (generate_answers, "a model's answers to the prompts of a benchmark"),
    "judge-pairwise": (judge_pairwise, "which of two models answers better, by a judge behind an endpoint"),
    "compare-evaluations": (compare_evaluations, "evaluations of several models side by side"),
    "report": (report, "what runs were and what they did, as a page of HTML"),
    "plot-runs": (plot_runs, "the paper's pictures from any runs"),
    "compare-runs": (compare_runs, "several runs beside each other"),
    "hf-to-megatron": (convert_hf_to_megatron, "a Hugging Face model -> a Megatron checkpoint"),
    "megatron-to-hf": (convert_megatron_to_hf, "a Megatron checkpoint -> a Hugging Face model"),
    "merge-adapter": (merge_adapter, "a PEFT adapter and its base model -> one Hugging Face model"),
    "verify-conversion": (verify_conversion, "whether a model computes the same in both forms"),
    "verify-checkpoint": (verify_checkpoint, "whether the files of a checkpoint are what was written"),
    "push-to-hub": (push_to_hub, "send an exported model to the Hugging Face Hub"),
    "completion": (completion, "print shell completion: completion bash|zsh|fish"),
}


def subcommand() -> int:
    """``megatron-rmipo NAME ...``: the command of that name, with the flags behind it."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in SUBCOMMANDS:
        sys.argv[:2] = [f"{sys.argv[0]} {name}"]
        command, _ = SUBCOMMANDS[name]
        return command()
    if name in ("-h", "--help"):
        print("usage: megatron-rmipo COMMAND [--FLAG VALUE ...]\n")
        print("\n".join(f"  {name:<21}{text}" for name, (_, text) in SUBCOMMANDS.items()))
        print("\nmegatron-rmipo COMMAND --help has the flags of each.")
        return DONE
    nearest = difflib.get_close_matches(name, SUBCOMMANDS, n=1)
    meant = f"did you mean {nearest[0]}?" if nearest else "see megatron-rmipo --help."
    print(f"error: megatron-rmipo {name}: no such command; {meant}", file=sys.stderr)
    return FAULT_OF_USER


if __name__ == "__main__":
    sys.exit(start("megatron_rmipo.entry"))
